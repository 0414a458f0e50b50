"""The event loop's side of the engines, and the threads behind it."""
