"""The server as syncd sees it: connections and their sessions, identity, the outbox, sources, the catalogue, the schema."""
