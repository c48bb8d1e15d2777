"""Builds that make searches fast: codebooks, parts, joins, measured recall.

They are planned and run alongside readers and the writer.
"""
