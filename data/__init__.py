"""From text to batches: sources, tokenizers, token files, and the order in which training reads
them."""
