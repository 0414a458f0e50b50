"""Fakes that ship: what a test of Keepwarm, or of its user, needs in place of a model."""
