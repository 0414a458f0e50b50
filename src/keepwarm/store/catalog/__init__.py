"""The catalogue: agents as data and which records lie on disk, in SQLite."""
