"""The operators' side: HTTP interface, pages, metrics, logs."""
