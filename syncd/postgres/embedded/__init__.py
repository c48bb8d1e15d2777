"""The embedded PostgreSQL: its programs, account, files, processes and users."""
