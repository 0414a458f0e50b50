"""Operating the server: health, metrics, logs, the page."""
