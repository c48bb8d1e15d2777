"""The words that every part of syncd shares: keys, names, metrics, positions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, NewType

Slot = NewType("Slot", int)
"""The number of a row's place in a dataset's files; it never changes and is never used again."""

DatasetName = NewType("DatasetName", str)
"""A dataset's full name, ``project/dataset``, with ``/`` and ``%`` inside the project
percent-encoded.
"""

Metric = Literal["cosine", "l2", "ip"]

TOKEN = re.compile(r"\d{1,20}(\.[0-9a-f]{8}\.\d{1,10})?", re.ASCII)
"""What ``syncd.token()`` writes; version 0.1.0 wrote the transaction id alone."""

KeyKind = Literal["integer", "uuid", "text", "date", "timestamp", "timestamptz", "composite"]

Key = int | str
"""A row's key inside syncd: ``int`` for integers, the canonical lower-case text for a uuid, ISO
8601 for a time (in UTC for timestamptz), the text itself for text, and compact JSON text of an
array (``[1,"a"]``) for a composite key. The RPC turns it into the contract's JSON form and back.
"""

ColumnKind = Literal[
    "integer",
    "real",
    "double",
    "numeric",
    "text",
    "character",
    "enum",
    "boolean",
    "uuid",
    "instant",
    "timestamp",
    "date",
    "text_array",
    "integer_array",
    "json",
]
"""How the values of an attached column are compared, as ``syncd.column_kind`` finds it; ``instant``
is timestamptz.
"""


@dataclass(frozen=True, slots=True)
class AttachedColumn:
    """A column that a search may filter on and include."""

    name: str
    kind: ColumnKind


def dataset_name(project: str, dataset: str) -> DatasetName:
    """The full name of a dataset; ``/`` and ``%`` inside the project are percent-encoded so that
    the first ``/`` splits.
    """
    return DatasetName(f"{project.replace('%', '%25').replace('/', '%2F')}/{dataset}")


def full_dataset_name(name: str) -> DatasetName:
    """What a user typed, as a full name: the project ``default`` may be left out where the dataset
    has no ``/``.
    """
    return DatasetName(name if "/" in name else f"default/{name}")


@dataclass(frozen=True, slots=True)
class Token:
    """A writer's token. ``history`` names the database whose transaction it is, as
    ``syncd.history()`` does; empty: the present one.
    """

    xid: int
    history: str = ""

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read what ``syncd.token()`` writes, ``xid`` or ``xid.history``; raises ``ValueError`` on
        anything else.
        """
        if TOKEN.fullmatch(text) is None:
            raise ValueError(text)
        xid, _, history = text.partition(".")
        return cls(int(xid), history)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A ``pg_snapshot``: transactions below ``xmax`` that are not ``in_progress`` are visible, once
    they have committed.
    """

    xmin: int
    xmax: int
    in_progress: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Read Postgres' own text form, ``xmin:xmax:xip,xip,…``; raises ``ValueError`` on anything
        else.
        """
        xmin, xmax, in_progress = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(int(xid) for xid in in_progress.split(",") if xid))

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, sorted(self.in_progress)))}"

    def sees(self, xid: int) -> bool:
        """Whether a transaction with this 64-bit id had ended when the snapshot was taken."""
        return xid < self.xmax and xid not in self.in_progress

    def age(self) -> tuple[int, int]:
        """A key that orders the snapshots of one session by age, the oldest first."""
        return self.xmax, -len(self.in_progress)

    def covers(self, other: Snapshot) -> bool:
        """Whether this one sees every transaction that ``other`` sees."""
        newly_hidden = {xid for xid in self.in_progress if xid < other.xmax} - other.in_progress
        return self.xmax >= other.xmax and not newly_hidden

    def lacks(self, freed: Snapshot | None) -> bool:
        """Whether changes that this one does not see may be gone from the outbox; ``freed`` sees
        all that are.
        """
        return freed is not None and not self.covers(freed)


@dataclass(frozen=True, slots=True)
class Position:
    """Where an index stands: it equals its table at ``snapshot``. ``outbox_id`` is the last outbox
    row applied; two positions are equal when their snapshots are.
    """

    snapshot: Snapshot
    outbox_id: int = field(compare=False)
