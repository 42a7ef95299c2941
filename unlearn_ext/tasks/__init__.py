"""What a batch is, what a model answers to it, and losses with one value per sample."""
