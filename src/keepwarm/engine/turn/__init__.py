"""One request: taken in, run, answered."""
