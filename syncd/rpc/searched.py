"""What a search needs of a dataset: the main process and its readers have one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from syncd.index.filter.language import Filter
from syncd.index.rows.vectors import Vectors
from syncd.index.view import View
from syncd.protocol.messages import SearchParams, WirePosition
from syncd.types import DatasetName, Key, KeyKind


class Searched(Protocol):
    """A dataset that answers."""

    @property
    def name(self) -> DatasetName:
        """Its full name."""

    @property
    def key_kind(self) -> KeyKind:
        """Kind of its keys."""

    @property
    def key_kinds(self) -> Sequence[KeyKind]:
        """Kinds of the columns of a composite key."""

    def look(self) -> tuple[WirePosition, View]:
        """Its position, and its view as of this position or later."""

    def note_queries(
        self, params: SearchParams, queries: Vectors, wanted: Filter | None, own: Key | None
    ) -> None:
        """Note the queries (q, dim) of a search by codes that was answered.

        ``wanted`` is their filter, and ``own`` the key of the row that is the query.
        """
