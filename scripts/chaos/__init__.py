"""Breaks Redis while bands play: `python -m scripts.chaos`."""
