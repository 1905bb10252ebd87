"""Handoff of connections between the workers that share a port."""
