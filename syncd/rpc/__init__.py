"""The server's side of the RPC: sockets, connections, requests to methods, and where a search runs."""
