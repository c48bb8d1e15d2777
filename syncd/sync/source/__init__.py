"""One followed table: its rows as they are read, its datasets, its quarantine, its doubts, and the scan under way."""
