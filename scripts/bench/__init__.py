"""Benchmarks, `python -m scripts.bench`; README.md explains each."""
