"""What the network computes: one device, no training, no parallelism."""
