"""One followed table: its rows, datasets and quarantine, its known catalogue, and its scan."""
