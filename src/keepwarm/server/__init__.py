"""HTTP: translation only. Every dialect becomes one request, and one stream of events, and back."""
