"""What a table of documents may hold: each document is checked before a write, so that all that was
written can be found.

The invariant: what passes is stored as it is, can be indexed, and comes back equal, but for what
``json_value`` converts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from psycopg.types.json import Jsonb

from syncd.client.calls import Vector
from syncd.errors import InvalidDocument, InvalidVector
from syncd.index.rows.vectors import VectorFormat
from syncd.json_values import json_value, text
from syncd.types import Metric

T = TypeVar("T")

MAX_ID_BYTES = 2000
"""Bytes of an id in UTF-8; an index entry of PostgreSQL holds 2704, the collection's name among
them.
"""


@dataclass(frozen=True, slots=True)
class Document:
    """A row without its vector. ``document_id`` names what it was cut from, where it was."""

    id: str
    content: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    document_id: str | None = None


def checked_rows(
    collection: str, documents: Sequence[Document], vectors: Sequence[Vector | None], metric: Metric
) -> list[dict[str, Any]]:
    """The rows of these documents; raises ``InvalidDocument`` that names each that cannot be stored
    or indexed.
    """
    wrong = InvalidDocuments(len(documents))
    rows = []
    for document, vector in zip(documents, vectors, strict=True):
        with wrong.of(document.id):
            rows.append(
                {
                    "collection": collection,
                    "id": part("the id", checked_id, document.id),
                    "document_id": part("the document's id", text_or_none, document.document_id),
                    "content": part("the text", checked_text, document.content),
                    "metadata": Jsonb(part("the metadata", json_value, document.metadata)),
                    "embedding": checked_vector(vector, metric).tolist(),
                }
            )
    wrong.raise_if_any("correct them, and write again")
    return rows


def check_lengths(
    rows: Sequence[Mapping[str, Any]], present: Iterable[int], collection: str
) -> None:
    """Raise ``InvalidDocument`` unless the vectors have the length of those that are ``present``,
    or else one length.
    """
    lengths = Counter(present)
    what = f"the vectors of collection {collection!r} have"
    if not lengths:
        lengths, what = (
            Counter(len(row["embedding"]) for row in rows),
            "most vectors of this write have",
        )
    wrong = InvalidDocuments(len(rows))
    for row in rows:
        with wrong.of(row["id"]):
            expected, got = lengths.most_common(1)[0][0], len(row["embedding"])
            if got != expected:
                raise ValueError(f"its vector has {got} dimensions, {what} {expected}")
    wrong.raise_if_any(
        "embed with the model that filled the collection, or delete the collection's documents "
        "first"
    )


class InvalidDocuments:
    """The documents of one write that are wrong, and why."""

    NAMED = 5

    def __init__(self, total: int) -> None:
        self.total = total
        self.reasons: list[str] = []

    def of(self, name: object) -> _Noting:
        """Note the ``ValueError`` of a block as that of this document."""
        return _Noting(self.reasons, name)

    def raise_if_any(self, hint: str) -> None:
        """Raise ``InvalidDocument`` that names the first of them."""
        if not self.reasons:
            return
        more = len(self.reasons) - self.NAMED
        named = "; ".join(self.reasons[: self.NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise InvalidDocument(
            f"nothing was written: {len(self.reasons)} of {self.total} documents cannot be stored: "
            f"{named}",
            hint=hint,
        )


class _Noting:
    def __init__(self, reasons: list[str], name: object) -> None:
        self.reasons = reasons
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if isinstance(error, ValueError):
            self.reasons.append(f"{self.name!r:.100}: {error}")
            return True
        return False


def part(name: str, check: Callable[[Any], T], value: object) -> T:
    """What a check makes of a part of a document, which its error names."""
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def checked_id(value: object) -> str:
    """A document's id."""
    found = checked_text(value)
    if len(found.encode()) > MAX_ID_BYTES:
        raise ValueError(f"it has more than {MAX_ID_BYTES} bytes")
    return found


def checked_text(value: object) -> str:
    """Text that can be stored."""
    if not isinstance(value, str):
        raise ValueError(f"expected text, got a value of type {type(value).__name__}")  # noqa: TRY004 - one of a document's reasons
    return text(value)


def text_or_none(value: object) -> str | None:
    """Text that can be stored, or none."""
    return None if value is None else checked_text(value)


def checked_vector(value: Vector | None, metric: Metric) -> NDArray[np.float32]:
    """A vector that can be indexed under this metric."""
    if value is None:
        raise ValueError("it has no vector")
    try:
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # too large for float32 becomes infinite, and is told as such
            vector = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"its vector is not a list of numbers: {error}") from error
    if vector.ndim != 1:
        raise ValueError(f"its vector is not a list of numbers: it has the shape {vector.shape}")
    if not vector.size:
        raise ValueError("its vector has no element")
    try:
        VectorFormat(metric, half=False).store(vector[None])
    except InvalidVector as error:
        raise ValueError(error.message) from error
    return vector


def storable(ids: Iterable[object]) -> list[str]:
    """Those of these ids that a document may have."""
    found = []
    for each in ids:
        try:
            found.append(checked_id(each))
        except ValueError:
            continue
    return found
