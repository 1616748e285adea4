"""Results on the disk, and how they are drawn."""
