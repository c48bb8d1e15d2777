"""Filters: the language of conditions, the values of attached columns as arrays, and the slots that
pass.
"""
