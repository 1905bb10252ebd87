"""Redis over anyio streams: one multiplexed connection, and one for pub/sub."""
