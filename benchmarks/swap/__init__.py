"""Two models that share memory for one: what a swap takes, keeps and leaves."""
