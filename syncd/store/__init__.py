"""A checkpoint on disk: it is complete or ignored."""
