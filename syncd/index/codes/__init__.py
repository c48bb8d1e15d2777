"""Codes: compressed vectors in *parts* that share one codebook, their files, and the settings that
reach a recall.
"""
