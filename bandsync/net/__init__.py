"""The network side: listener, WebSocket connections, send queues, drain."""
