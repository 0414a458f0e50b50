"""Static pages; no build step."""
