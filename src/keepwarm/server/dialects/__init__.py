"""How each client speaks: a request becomes the engine's, and its events become an answer."""
