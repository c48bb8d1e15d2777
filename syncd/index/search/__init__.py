"""Searches of one view: planned once, then answered by codes or exactly; distances are always
exact.
"""
