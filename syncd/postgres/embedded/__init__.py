"""The PostgreSQL that syncd brings along: its programs, the account it runs as, its files and processes, and who uses it."""
