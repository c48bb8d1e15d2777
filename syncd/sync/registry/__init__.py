"""What there is, by name: datasets, counters, alerts. Anything may read it."""
