"""A checkpoint's record of a dataset's codes. Their files are listed with the dataset's other
files.
"""

from __future__ import annotations

import msgspec

from syncd.index.codes.calibration import Calibration


class SavedPart(msgspec.Struct, frozen=True):
    """One part of the codes: the file ``name`` has the codes of ``rows`` rows.

    Their slots are in ``start <= slot < stop``.
    """

    number: int
    start: int
    stop: int
    rows: int
    name: str


class SavedCodes(msgspec.Struct, frozen=True):
    """The codes of a dataset; their files are listed with the dataset's other files."""

    codebook_number: int
    codebook_name: str
    trained_rows: int
    trained_slots: int
    unevenness_trained: float
    parts: tuple[SavedPart, ...]
    calibration: Calibration
