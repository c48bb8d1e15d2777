"""A *generation*: the columns of one dataset from its first row to its last, how they are saved,
and how dead slots are given back.
"""
