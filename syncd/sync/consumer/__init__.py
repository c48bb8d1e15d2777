"""Passes over all sources: when one is due, one step from snapshot to snapshot, and how far the consumer has come."""
