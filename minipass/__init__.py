"""minipass: Parallel Speculative Sampling (PaSS, arXiv 2311.13581) from scratch, exact and small enough to read."""
