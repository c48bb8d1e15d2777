"""The RPC server: sockets, connections, the methods, and the choice of a search's thread."""
