"""The keys under which a request's ASGI scope holds Keepwarm's own facts."""

CONNECTIONS = "keepwarm.connections"
"""The open connections of the server."""
REQUEST_ID = "keepwarm.request_id"
"""The request's id, the client's own or a new one."""
ROLE = "keepwarm.role"
"""The caller's Role."""
