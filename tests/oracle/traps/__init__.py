"""Data of ``python -m tests.oracle.prove_traps``: edits of the code, and tests that must fail."""
