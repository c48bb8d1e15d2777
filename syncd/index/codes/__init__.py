"""Codes: compressed vectors in *parts* that share one codebook, their files, and their settings."""
