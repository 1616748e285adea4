"""`atlas-eval`: what a trained model knows of long contexts, on this machine's data alone."""
