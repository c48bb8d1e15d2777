"""What a row is made of: its vector in the form that is stored and compared, its key, and the map
from key hashes to slots.
"""
