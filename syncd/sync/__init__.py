"""The consumer: it follows the tables pass by pass, and keeps indexes and checkpoints in step.

The floors, ground first: `registry` (datasets by name, counters), `source` (one followed table),
`consumer` (passes over all tables), `background` (tasks that run alongside passes).
"""
