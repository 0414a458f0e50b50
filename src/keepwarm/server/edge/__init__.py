"""The checks that every request passes first: its connection, its sender, its body."""
