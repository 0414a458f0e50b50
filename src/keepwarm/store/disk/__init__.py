"""Files, their format and their bytes. On the I/O thread."""
