"""sparseling: the Ling 2.0 recipe made whole, from raw text to a small or trillion-parameter sparse reasoning model."""

__version__ = "0.1.0"
