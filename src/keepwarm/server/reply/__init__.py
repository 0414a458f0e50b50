"""A reply on its way to its client, whatever the dialect."""
