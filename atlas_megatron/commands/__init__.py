"""What the scripts of tools/ start: their options, and what they say."""
