"""A process killed in every phase: no committed turn lost, nothing wrong, no unreadable home."""
