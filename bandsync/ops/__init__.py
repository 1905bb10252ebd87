"""What operators see: HTTP, metrics, logs."""
