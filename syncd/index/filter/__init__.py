"""Filters: the language of conditions, the values of attached columns as arrays, and which slots a
filter lets through.
"""
