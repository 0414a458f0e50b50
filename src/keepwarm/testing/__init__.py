"""Fakes that ship: in place of a model, a disk or a clock, for tests of Keepwarm and of its users.

A fake of a port passes the contract suite of the real one. Its docstring says what it promises
beyond the port, and what it records for a test to look at.
"""
