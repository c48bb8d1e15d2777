"""More than one syncd: shards, their replicas, and the router that asks them all.

A layout is the set of shards that share all buckets. A replica is one syncd of a shard. A shard is
missing in an answer if none of its replicas answered.
"""
