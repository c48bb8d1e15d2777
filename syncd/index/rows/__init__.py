"""The parts of a row: its vector as stored and compared, its key, and the map from key hashes to
slots.
"""
