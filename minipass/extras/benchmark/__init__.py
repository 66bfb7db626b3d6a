"""What bench.py runs; nothing else in the package needs it. Read experiments.py first."""
