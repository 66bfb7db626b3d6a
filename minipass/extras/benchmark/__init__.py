"""What bench.py runs; nothing else in the package needs it. Start with experiments.py."""
