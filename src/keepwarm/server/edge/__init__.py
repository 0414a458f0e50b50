"""What a request meets before it is trusted: connection, guard, body."""
