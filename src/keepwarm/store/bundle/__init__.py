"""Agents in one file, for another machine."""
