"""Text to ids and back: what a prompt is made of, and which line it continues."""
