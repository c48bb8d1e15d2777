"""Codes that are made while the rows of a dataset are being read for the first time.

Nobody searches the dataset yet, so one part grows until the reading has ended. The codebook is
trained on the first rows, with as many lists as the expected number of rows needs. If they were
unlike the others, or too few or too many rows came, all codes are trained again: by ``is_usable``,
or by ``plan_build`` while these codes answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from syncd.index.build.encoding import Encoder
from syncd.index.build.training import lists_for, train
from syncd.index.codes.codes import unevenness
from syncd.index.storage.stopping import Stop
from syncd.index.view import View

WRONG_LISTS = 2
"""Largest factor between the number of lists and the one that the dataset needs."""


@dataclass(slots=True)
class Ahead:
    """A growing part of the rows of one generation."""

    generation: int
    encoder: Encoder
    unevenness: float = 0.0
    """Unevenness of the lists over the rows that they were trained on; 0: those are all rows."""

    @classmethod
    def begun(cls, view: View, generation: int, number: int, expected: int, stop: Stop) -> Ahead:
        """Codes of the present rows, of the ``expected`` ones; raises ``Cancelled``."""
        encoder = Encoder(train(view, number, number, stop, expected=expected))
        encoder.encode(view, view.count & ~7, stop)
        return cls(generation, encoder, unevenness(encoder.sizes))

    def is_usable(self, view: View, generation: int) -> bool:
        """Whether the codes are of a view's rows, with about as many lists as it needs."""
        lists, wanted = self.encoder.codebook.lists, lists_for(view.live.count)
        few_or_many = max(lists, wanted) > WRONG_LISTS * min(lists, wanted)
        return self.generation == generation and not few_or_many
