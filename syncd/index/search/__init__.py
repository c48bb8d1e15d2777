"""Searches of one view: planned once, then answered by codes or exactly. Distances are exact either
way.
"""
