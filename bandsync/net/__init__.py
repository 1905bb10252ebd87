"""Bytes to messages and back: listener, connections, outboxes."""
