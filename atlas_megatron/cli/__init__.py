"""How a command ends, what it says of itself, and what it keeps off the screen."""
