"""A trained model that reads and continues a text of any length."""
