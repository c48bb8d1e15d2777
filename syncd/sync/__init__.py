"""The consumer: it follows the tables, pass by pass, and keeps indexes and checkpoints in step."""
