"""The wire contract: messages, commands, snapshots, WebSocket frames, limits. Pure."""
