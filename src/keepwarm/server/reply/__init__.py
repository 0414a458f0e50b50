"""Replies and files on their way between the engine and a client, whatever the dialect."""
