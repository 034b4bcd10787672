"""Running a model: sampling, batched generation with a KV cache, and the terminal chat."""
