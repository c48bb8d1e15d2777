"""Passes over all sources: when a pass is due, the pass itself, and the consumer's progress."""
