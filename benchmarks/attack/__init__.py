"""Requests too large in every way, crowds that hang up, SIGKILL behind acknowledgements."""
