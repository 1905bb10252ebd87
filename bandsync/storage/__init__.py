"""Storages of sessions: memory and Redis, behind one interface."""
