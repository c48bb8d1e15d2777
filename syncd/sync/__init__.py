"""The consumer: it follows the tables pass by pass, and keeps indexes and checkpoints in step.

Ground first: `registry` (what there is, by name, and what is counted), `source` (one followed table), `consumer` (passes over
all of them, when, and how far), `background` (what runs alongside passes: checkpoints, verify, builds, reports).
"""
