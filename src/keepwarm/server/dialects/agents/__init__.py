"""Keepwarm's own API: agents with names, turns and memory that they keep."""
