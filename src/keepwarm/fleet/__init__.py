"""Several models over one store and one memory budget. On the engines' thread."""
