"""The protocol, described once for client and service: messages, JSON forms, TCP keep-alive."""
