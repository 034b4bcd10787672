"""Weights in and out: public Hugging Face folders, the hub, conversion and merging; training state."""
