"""A checkpoint on disk: it is complete or ignored. The data directory's lock and paths."""
