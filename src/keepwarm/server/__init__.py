"""HTTP, which only translates: every dialect to one kind of request, and events back to it."""
