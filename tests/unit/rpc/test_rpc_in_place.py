"""Which searches run in the event loop, and which leave it to waiting connections."""

from __future__ import annotations

import socket

from syncd.rpc.in_place import (
    COMPANY_SECONDS,
    LEAST_THREADS,
    LONGER_ELEMENTS,
    SHORT_ELEMENTS,
    InPlace,
)
from syncd.rpc.inputs import MOST_CONNECTIONS, Inputs


def test_a_short_search_always_stays_and_a_long_one_never() -> None:
    place = InPlace(lambda: True, LEAST_THREADS)
    for at in (0.0, COMPANY_SECONDS / 2, 1.0):
        assert place.allows(SHORT_ELEMENTS, at)
        place.ended(SHORT_ELEMENTS, at)
        assert not place.allows(LONGER_ELEMENTS + 1, at)


def test_a_longer_search_stays_until_another_connection_has_waited() -> None:
    waits = False
    place = InPlace(lambda: waits, LEAST_THREADS)
    for at in (0.0, 0.001, 0.002):
        assert place.allows(LONGER_ELEMENTS, at)
        place.ended(LONGER_ELEMENTS, at)
    waits = True
    place.ended(LONGER_ELEMENTS, 1.0)
    assert not place.allows(LONGER_ELEMENTS, 1.0 + COMPANY_SECONDS / 2)
    assert place.allows(LONGER_ELEMENTS, 1.0 + 2 * COMPANY_SECONDS), "it is tried again"
    on_two_cores = InPlace(lambda: True, LEAST_THREADS - 1)
    on_two_cores.ended(LONGER_ELEMENTS, 1.0)
    assert on_two_cores.allows(LONGER_ELEMENTS, 1.0)


def test_a_waiting_connection_is_seen_and_a_closed_one_is_not() -> None:
    inputs, one, other = Inputs(), object(), object()
    mine, theirs = socket.socketpair()
    with mine, theirs:
        inputs.add(mine.fileno(), one)
        assert not inputs.waiting()
        theirs.send(b"?")
        assert inputs.waiting()
        inputs.add(mine.fileno(), other)  # the number is another connection's now
        inputs.remove(mine.fileno(), one)
        assert inputs.waiting()
        inputs.remove(mine.fileno(), other)
        assert not inputs.waiting()


def test_among_very_many_connections_one_is_assumed_to_wait() -> None:
    inputs, owner = Inputs(), object()
    pairs = [socket.socketpair() for _ in range(MOST_CONNECTIONS + 1)]
    for mine, _ in pairs:
        assert not inputs.waiting()
        inputs.add(mine.fileno(), owner)
    assert inputs.waiting()
    for mine, theirs in pairs:
        mine.close()
        theirs.close()
