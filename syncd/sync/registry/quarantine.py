"""Reasons why a live row is not indexed: the meaning of each, and the next step.

``syncd.types.QuarantineReason`` names them. The page on faults lists the same.
"""

from __future__ import annotations

from typing import NamedTuple


class Explanation(NamedTuple):
    """The property that keeps a row out of the index, and the next step."""

    meaning: str
    step: str


EXPLANATIONS: dict[str, Explanation] = {
    "dimension_mismatch": Explanation(
        "another length than the dataset's", "embed these rows with the model that filled it"
    ),
    "dataset_taken": Explanation(
        "the dataset belongs to another source",
        "change a dataset or project expression with syncd attach",
    ),
    "null_dataset": Explanation(
        "the project or dataset expression gives NULL",
        "fill its columns, or attach with coalesce(…)",
    ),
    "null_key": Explanation(
        "the key, or a part of it, is NULL",
        "write it, or attach with another key: syncd attach TABLE --key COL",
    ),
    "expression_failed": Explanation(
        "the live, project or dataset expression raises an error on the row",
        "correct the row, or attach with another expression: syncd attach TABLE --live SQL",
    ),
    "nan": Explanation(
        "a NaN or an infinity, or a number too large for the index", "write the vectors again"
    ),
    "zero_norm": Explanation(
        "zero norm has no cosine distance",
        "write the vectors again, or attach with --metric l2",
    ),
    "empty": Explanation("no elements", "write a vector, or NULL"),
    "null_element": Explanation("an element is NULL", "write the vectors again"),
    "not_one_dimensional": Explanation("not a one-dimensional array", "write the vectors again"),
    "not_float32": Explanation(
        "bytes that are not little-endian float32", "write the vectors again"
    ),
}
"""Explanation by ``QuarantineReason``."""

LIST_ROWS = "SELECT reason, dataset, key FROM syncd.quarantine ORDER BY reason, dataset, key;"
"""Command that lists the rows."""


def next_step(reason: str) -> str:
    """Meaning of a reason, the next step, and the command that lists the rows."""
    known = EXPLANATIONS.get(reason)
    if known is None:  # the service is newer than this command
        return f"see the rows: {LIST_ROWS}"
    return f"{known.meaning}: {known.step}; see the rows: {LIST_ROWS}"
