"""Text to batches: sources, cleaning, deduplication, tokenizer, shards, mixture, loader."""
