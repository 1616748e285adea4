"""Files that are whole or not there at all, and how to tell whether one still is what was written."""
