"""Access to the server: connections, sessions, identity, outbox, sources, catalogue, schema."""
