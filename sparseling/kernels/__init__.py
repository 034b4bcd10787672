"""The few operations that decide the speed, each with a plain-PyTorch reference that defines "correct"."""
