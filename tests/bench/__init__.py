"""Measurements that only syncd's developers ask for: ``python -m tests.bench --help``."""
