"""Chaos runs, `python -m scripts.chaos`: faults are injected while bands play."""
