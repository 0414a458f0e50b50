"""Agents, their lines and turns, and what the store has of them."""
