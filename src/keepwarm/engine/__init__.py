"""The runtime: one thread owns all of it."""
