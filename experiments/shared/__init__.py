"""What experiments share: records, small models and their training, the protocol of comparisons."""
