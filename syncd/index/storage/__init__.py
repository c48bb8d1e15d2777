"""Bytes on disk and in memory: columns of fixed-size chunks, byte strings, files, bitmaps.

A *slot* is a row's number. It never changes.
"""
