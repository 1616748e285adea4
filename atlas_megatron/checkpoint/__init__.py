"""What a run leaves on the disk, so that it ends where an unbroken one does."""
