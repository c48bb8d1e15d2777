"""Reasons in quarantine: each has a meaning, a next step and a command."""

from __future__ import annotations

from typing import get_args, get_type_hints

from syncd.index.rows import vectors
from syncd.postgres.vectors import Decoded
from syncd.sync.registry.quarantine import EXPLANATIONS, LIST_ROWS, next_step
from syncd.sync.source.quarantined import Quarantine
from syncd.types import QuarantineReason


def test_every_reason_has_a_meaning_a_next_step_and_a_command() -> None:
    assert list(EXPLANATIONS) == list(get_args(QuarantineReason))
    for reason, explanation in EXPLANATIONS.items():
        assert next_step(reason).startswith(f"{explanation.meaning}: {explanation.step}; ")
        assert next_step(reason).endswith(LIST_ROWS)


def test_a_reason_of_a_newer_service_has_a_command_too() -> None:
    assert next_step("a_new_reason").endswith(LIST_ROWS)


def test_no_other_reason_can_be_given() -> None:
    """Type checking holds each reason that is given to the list."""
    assert get_type_hints(Quarantine.put)["reason"] is QuarantineReason
    assert get_type_hints(Decoded)["bad"] == list[tuple[int, QuarantineReason]]
    assert set(get_args(vectors.Reason)) < set(get_args(QuarantineReason))
