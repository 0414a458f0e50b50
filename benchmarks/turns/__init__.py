"""Agents that take turns over HTTP, on Keepwarm's server and on others'."""
