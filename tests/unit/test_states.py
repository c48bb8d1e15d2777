"""States of datasets: a table of all combinations of facts."""

from __future__ import annotations

from itertools import product
from typing import Any

from syncd.errors import Trouble
from syncd.sync.registry.states import (
    ANSWERING,
    MUST_REBUILD_REASON,
    Condition,
    Facts,
    Standing,
    state_of,
)
from tests.documents import DOCS, cells, lines

FAILED = Trouble("it broke", "run this", "repair it")
WEAK = Trouble("a trigger is gone", "repair")

TABLE: list[tuple[dict[str, object], Condition]] = [
    # facts                                                   state and reason
    ({"failed": FAILED}, Condition("failed", "it broke: repair it: run this", "run this")),
    ({"caught_up": False, "must_rebuild": True}, Condition("must_rebuild", MUST_REBUILD_REASON)),
    ({"caught_up": False, "began_empty": True}, Condition("backfilling", "")),
    ({"caught_up": False}, Condition("catching_up", "")),
    ({"weakness": WEAK}, Condition("rebuilding", "a trigger is gone: repair", "repair")),
    ({"doubt": "doubted"}, Condition("rebuilding", "doubted")),
    ({"replaced": True}, Condition("rebuilding", "")),
    ({"rebuilt": True}, Condition("rebuilding", "")),
    ({}, Condition("ready", "")),
]
"""The first line whose facts hold decides."""

VALUES: dict[str, tuple[Any, ...]] = {
    "failed": (None, FAILED),
    "caught_up": (True, False),
    "must_rebuild": (False, True),
    "began_empty": (False, True),
    "replaced": (False, True),
    "rebuilt": (False, True),
    "weakness": (None, WEAK),
    "doubt": ("", "doubted"),
}


def test_every_combination_of_facts_has_the_state_of_the_table() -> None:
    assert tuple(VALUES) == Facts._fields
    combinations = [Facts(*values) for values in product(*VALUES.values())]
    assert len(combinations) == 2**8
    for facts in combinations:
        given = facts._asdict()
        expected = next(found for wanted, found in TABLE if wanted.items() <= given.items())
        assert state_of(facts) == expected, facts


def test_a_dataset_answers_only_when_it_has_caught_up_and_its_source_can_be_read() -> None:
    for values in product(*VALUES.values()):
        facts = Facts(*values)
        answers = facts.failed is None and facts.caught_up
        assert (state_of(facts).state in ANSWERING) == answers


def test_a_standing_is_caught_up_only_until_it_fails_or_is_read_again() -> None:
    standing = Standing()
    assert (standing.answers, standing.began_empty) == (False, True)
    standing.catch_up()
    assert standing.answers
    standing.fail(FAILED)
    assert (standing.answers, standing.failed) == (False, FAILED)
    standing.begin(empty=False)
    assert (standing.answers, standing.failed, standing.began_empty) == (False, None, False)
    standing.catch_up()
    assert standing.answers


def test_the_page_lists_the_states_in_the_order_of_the_table() -> None:
    section = (DOCS / "concepts.md").read_text("utf-8").partition("## States of a dataset")[2]
    section = section.partition("\n## ")[0]
    rows = [cells(line.text) for line in lines(section) if line.kind == "table"][2:]
    listed = [(row[0].strip("`"), row[1].startswith("yes")) for row in rows]
    expected = dict.fromkeys(condition.state for _, condition in TABLE)
    assert listed == [(state, state in ANSWERING) for state in expected]
