"""Bytes on disk and in memory: columns of fixed-size chunks, blobs, files, bitmaps. A *slot* is a
row's number and never changes.
"""
