"""Words that all parts of syncd share: keys, names, metrics, positions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, NewType

Slot = NewType("Slot", int)
"""Number of a row's place in a dataset's files; it never changes and is never used again."""

DatasetName = NewType("DatasetName", str)
"""A dataset's full name, ``project/dataset``; ``/`` and ``%`` in the project are percent-encoded.
"""

Metric = Literal["cosine", "l2", "ip"]

IndexKind = Literal["exact", "building", "codes"]
"""The way an index answers; ``building``: exactly, until its codes are built."""

RecallOf = Literal["rows", "queries"]
"""Queries on which recall was measured: the dataset's own rows, or queries that were asked."""

State = Literal["backfilling", "catching_up", "ready", "rebuilding", "must_rebuild", "failed"]
"""State of a dataset, and of the service as a whole."""

QuarantineReason = Literal[
    "dimension_mismatch",
    "dataset_taken",
    "null_dataset",
    "null_key",
    "expression_failed",
    "nan",
    "zero_norm",
    "empty",
    "null_element",
    "not_one_dimensional",
    "not_float32",
]
"""Why a live row is not indexed; ``syncd.sync.registry.quarantine`` explains each."""

TOKEN = re.compile(r"\d{1,20}(\.[0-9a-f]{8}\.\d{1,10})?", re.ASCII)
"""Form of the text that ``syncd.token()`` returns; version 0.1.0 returned only the transaction id.
"""

KeyKind = Literal["integer", "uuid", "text", "date", "timestamp", "timestamptz", "composite"]

Key = int | str
"""A row's key inside syncd.

``int`` for integers, the canonical lower-case text for a uuid, ISO 8601 for a time (in UTC for
timestamptz), and the text itself for text. A composite key is compact JSON text of an array
(``[1,"a"]``). The RPC converts keys to the contract's JSON form and back.
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
"""How the values of an attached column are compared, as ``syncd.column_kind`` returns it.

``instant`` is timestamptz.
"""


@dataclass(frozen=True, slots=True)
class AttachedColumn:
    """A column that a search may filter on and include."""

    name: str
    kind: ColumnKind


def dataset_name(project: str, dataset: str) -> DatasetName:
    """The full name of a dataset.

    ``/`` and ``%`` inside the project are percent-encoded, so the first ``/`` splits the name.
    """
    return DatasetName(f"{project.replace('%', '%25').replace('/', '%2F')}/{dataset}")


def split_dataset_name(name: DatasetName) -> tuple[str, str]:
    """Project and dataset, as the user's expressions give them."""
    project, _, dataset = name.partition("/")
    return project.replace("%2F", "/").replace("%25", "%"), dataset


def full_dataset_name(name: str) -> DatasetName:
    """The full name for a user's input.

    The project ``default`` may be left out if the dataset has no ``/``.
    """
    return DatasetName(name if "/" in name else f"default/{name}")


@dataclass(frozen=True, slots=True)
class Token:
    """A writer's token.

    ``history`` identifies the database of its transaction, like ``syncd.history()``; if empty, it
    is the present database.
    """

    xid: int
    history: str = ""

    @classmethod
    def parse(cls, text: str) -> Token:
        """Parse the text of ``syncd.token()``, ``xid`` or ``xid.history``.

        Raises ``ValueError`` for other text.
        """
        if TOKEN.fullmatch(text) is None:
            raise ValueError(text)
        xid, _, history = text.partition(".")
        return cls(int(xid), history)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A ``pg_snapshot``.

    Committed transactions below ``xmax`` are visible, except those in ``in_progress``.
    """

    xmin: int
    xmax: int
    in_progress: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Parse PostgreSQL's text form, ``xmin:xmax:xip,xip,…``.

        Raises ``ValueError`` for other text.
        """
        xmin, xmax, in_progress = text.split(":")
        running = frozenset(int(xid) for xid in in_progress.split(",") if xid)
        return cls(int(xmin), int(xmax), running)

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, sorted(self.in_progress)))}"

    def sees(self, xid: int) -> bool:
        """Whether a transaction with this 64-bit id had ended when the snapshot was taken."""
        return xid < self.xmax and xid not in self.in_progress

    def age(self) -> tuple[int, int]:
        """A key that orders the snapshots of one session by age, the oldest first."""
        return self.xmax, -len(self.in_progress)

    def covers(self, other: Snapshot) -> bool:
        """Whether this snapshot sees every transaction that ``other`` sees."""
        newly_hidden = {xid for xid in self.in_progress if xid < other.xmax} - other.in_progress
        return self.xmax >= other.xmax and not newly_hidden

    def lacks(self, freed: Snapshot | None) -> bool:
        """Whether changes that this snapshot does not see may be gone from the outbox.

        ``freed`` sees all changes that are gone.
        """
        return freed is not None and not self.covers(freed)


@dataclass(frozen=True, slots=True)
class Position:
    """An index's position: the index equals its table at ``snapshot``.

    ``outbox_id`` is the last applied outbox row. Two positions are equal if their snapshots are.
    """

    snapshot: Snapshot
    outbox_id: int = field(compare=False)
