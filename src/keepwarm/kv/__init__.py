"""Ids and KV, no text: batch, tiers and the memory that they use. On the engines' thread."""
