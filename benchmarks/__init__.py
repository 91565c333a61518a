"""What the mesh costs and how fast news travels through it: ``python -m benchmarks``."""
