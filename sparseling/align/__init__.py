"""Alignment: the chat format, conversations with loss masks, supervised fine-tuning."""
