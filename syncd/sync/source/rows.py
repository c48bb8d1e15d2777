"""Rows as a reading of the table returns them, and the reasons why a reading rejects a row."""

from __future__ import annotations

from syncd.types import QuarantineReason

EXPRESSION_FAILED: QuarantineReason = "expression_failed"
NULL_KEY: QuarantineReason = "null_key"
"""Reasons of quarantined rows.

No one can ask for a ``NULL_KEY`` row by key: all of them are read when one of them may have changed.
"""

Row = tuple[str | int, str | None, str | None, bytes, int, str | None]
"""Key, project, dataset, vector, fingerprint and attached columns (a JSON array), as read."""

Rows = list[Row]
