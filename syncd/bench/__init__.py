"""``syncd bench``: measurements for users, on their own machine."""
