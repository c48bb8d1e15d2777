"""Stores for other people's frameworks, and helpers for their migrations."""
