"""From text files to batches: corpora, tokenizers, indexed datasets, and the order in which they are read."""
