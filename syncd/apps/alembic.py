"""``attach`` and ``detach`` for a program's own Alembic revisions, online and with ``--sql``.

``syncd init`` must create schema ``syncd`` before. It has a version table of its own, separate from
the program's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from alembic import op
from sqlalchemy import Boolean, Text, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY

from syncd.statements import statement
from syncd.types import Metric


def attach(
    source: str,
    *,
    key: Sequence[str] | None = None,
    vector: str | None = None,
    project: str | None = None,
    dataset: str | None = None,
    live: str | None = None,
    metric: Metric | None = None,
    columns: Sequence[str] | None = None,
    row_triggers: bool = False,
) -> None:
    """Call ``syncd.attach`` in a revision's ``upgrade``, in the revision's transaction.

    Arguments that are not given have the SQL function's defaults.
    """
    words = {
        "source": source,
        "vector": vector,
        "project": project,
        "dataset": dataset,
        "live": live,
        "metric": metric,
    }
    lists = {"key": key, "columns": columns}
    op.execute(
        text(with_colons(statement("schema", "attach"))).bindparams(
            *(bindparam(name, value, Text) for name, value in words.items()),
            *(
                bindparam(name, None if value is None else list(value), ARRAY(Text))
                for name, value in lists.items()
            ),
            bindparam("row_triggers", row_triggers, Boolean),
        )
    )


def detach(source: str) -> None:
    """Call ``syncd.detach`` in a revision's ``downgrade``."""
    op.execute(
        text(with_colons(statement("schema", "detach"))).bindparams(
            bindparam("source", source, Text)
        )
    )


def with_colons(query: str) -> str:
    """A statement with psycopg's parameters, rewritten with SQLAlchemy's."""
    return re.sub(r"%\((\w+)\)s", r":\1", query)
