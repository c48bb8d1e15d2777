"""What makes searches fast, decided and built beside readers and the writer: codebooks, parts,
joins, measured recall.
"""
