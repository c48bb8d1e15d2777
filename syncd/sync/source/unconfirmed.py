"""What was applied and may be lost in a crash of the server: since the last nonce that it has confirmed to be durable."""

from __future__ import annotations

from collections.abc import Iterable

from syncd.postgres.outbox import Cursor

MAX_UNCONFIRMED_KEYS = 200_000


class Unconfirmed:
    """What was applied since the last nonce that Postgres has confirmed to be durable: a crash may undo it under us."""

    def __init__(self, confirmed: Cursor) -> None:
        self.confirmed = confirmed
        self.keys: set[str] = set()
        self.everything = (
            False  # too much to list, or a whole table: then only reading all of it again is sure
        )

    def note(self, keys: Iterable[str]) -> None:
        """Remember keys, as the outbox has them, until a nonce confirms the commits that changed them."""
        if not self.everything:
            self.keys.update(keys)
            if len(self.keys) > MAX_UNCONFIRMED_KEYS:
                self.everything = True
                self.keys.clear()
