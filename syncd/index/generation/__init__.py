"""A *generation*: a dataset's columns from its first row to its last, how they are saved, and
compaction.
"""
