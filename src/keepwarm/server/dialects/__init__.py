"""The dialects of clients: a request becomes the engine's, and its events become an answer."""
