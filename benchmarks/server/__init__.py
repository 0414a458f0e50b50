"""What the server costs on top of the engine, and what generated requests do to it."""
