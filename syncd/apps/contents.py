"""Checks of documents before a write, so that every written document can be found.

Invariant: a document that passes is stored unchanged, can be indexed, and is equal when it is read
again, except for the conversions of ``json_value``.
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
"""Bytes of an id in UTF-8.

An index entry of PostgreSQL holds 2704 bytes, with the collection's name.
"""


@dataclass(frozen=True, slots=True)
class Document:
    """A row without its vector.

    ``document_id`` names the document that it was cut from; None: it was not cut from one.
    """

    id: str
    content: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    document_id: str | None = None


def checked_rows(
    collection: str, documents: Sequence[Document], vectors: Sequence[Vector | None], metric: Metric
) -> list[dict[str, Any]]:
    """The rows of these documents.

    Raises ``InvalidDocument``, which names the documents that cannot be stored or indexed.
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
    """Raise ``InvalidDocument`` unless all vectors have the length of the collection's vectors.

    ``present`` are lengths of vectors in the table. If there are none, the most frequent length of
    this write counts.
    """
    lengths = Counter(present)
    what = f"the vectors of collection {collection!r} have"
    if not lengths:
        lengths = Counter(len(row["embedding"]) for row in rows)
        what = "most vectors of this write have"
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
    """The documents of one write that cannot be stored, with the reasons."""

    NAMED = 5

    def __init__(self, total: int) -> None:
        self.total = total
        self.reasons: list[str] = []

    def of(self, name: object) -> _Noting:
        """Note a ``ValueError`` of the block as this document's reason."""
        return _Noting(self.reasons, name)

    def raise_if_any(self, hint: str) -> None:
        """Raise ``InvalidDocument``, which names the first of them, if there are any."""
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
    """The result of a check of one part of a document; the error names that part."""
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def checked_id(value: object) -> str:
    """The same id; raises ``ValueError`` if it cannot be stored."""
    found = checked_text(value)
    if len(found.encode()) > MAX_ID_BYTES:
        raise ValueError(f"it has more than {MAX_ID_BYTES} bytes")
    return found


def checked_text(value: object) -> str:
    """The same text; raises ``ValueError`` if it cannot be stored."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"expected text, got a value of type {kind}")  # noqa: TRY004 - a reason
    return text(value)


def text_or_none(value: object) -> str | None:
    """``checked_text``, or None for None."""
    return None if value is None else checked_text(value)


def checked_vector(value: Vector | None, metric: Metric) -> NDArray[np.float32]:
    """The vector as float32 of shape (d,); raises ``ValueError`` if the metric cannot index it."""
    if value is None:
        raise ValueError("it has no vector")
    try:
        # a number too large for float32 becomes infinite, and is refused below
        with np.errstate(over="ignore", invalid="ignore"):
            vector = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"its vector is not a list of numbers: {error}") from error
    if vector.ndim != 1:
        raise ValueError(f"its vector is not a list of numbers: it has the shape {vector.shape}")
    if not vector.size:
        raise ValueError("its vector has no elements")
    try:
        VectorFormat(metric, half=False).store(vector[None])
    except InvalidVector as error:
        raise ValueError(error.message) from error
    return vector


def storable(ids: Iterable[object]) -> list[str]:
    """Those of the ids that a document may have."""
    found = []
    for each in ids:
        try:
            found.append(checked_id(each))
        except ValueError:
            continue
    return found
