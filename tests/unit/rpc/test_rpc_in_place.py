"""Which searches keep the event loop, and which leave it to those who wait."""

from __future__ import annotations

from syncd.rpc.in_place import COMPANY_SECONDS, LONGER_ELEMENTS, NEXT_SECONDS, SHORT_ELEMENTS, InPlace


def test_a_short_search_always_stays_and_a_long_one_never() -> None:
    place = InPlace()
    for at in (0.0, NEXT_SECONDS / 2, 1.0):
        assert place.allows(SHORT_ELEMENTS, at)
        assert not place.allows(LONGER_ELEMENTS + 1, at)
        place.ended(at)


def test_a_longer_search_stays_while_one_client_asks_and_goes_once_another_has_waited() -> None:
    place, now = InPlace(), 0.0
    for _ in range(5):
        assert place.allows(LONGER_ELEMENTS, now)
        place.ended(now + 0.0005)
        now += 0.0005 + 2 * NEXT_SECONDS
    place.ended(now)
    assert not place.allows(LONGER_ELEMENTS, now + NEXT_SECONDS / 2), "this one was waiting"
    assert not place.allows(LONGER_ELEMENTS, now + COMPANY_SECONDS / 2), "whoever waits, waits for the threads now"
    assert place.allows(LONGER_ELEMENTS, now + 2 * COMPANY_SECONDS), "and they are tried again"
