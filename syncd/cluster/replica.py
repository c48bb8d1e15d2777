"""One replica of a shard, as the router sees it: its connection, its delays, its circuit.

Invariant: a replica that does not answer costs at most ``TIME_OUTS`` requests their time. After
that only probes are sent to it, until one of them is answered.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from time import monotonic
from typing import Any, TypeVar

import msgspec

from syncd.client import calls
from syncd.client.async_client import SplitClient
from syncd.client.async_link import Sent
from syncd.client.calls import Call
from syncd.client.exchange import NoAnswer, take_result
from syncd.cluster.layout import Registered
from syncd.errors import ServiceUnavailable, SyncdError
from syncd.protocol.messages import Params, WirePosition
from syncd.protocol.status_messages import ServiceStatus

TIME_OUTS = 2
"""Time-outs in a row after which only probes are sent."""
LEAST_TIME_OUT_SECONDS = 0.5
"""A request that allowed less than this says nothing about the replica if it times out."""
CONNECT_SECONDS = 2.0
"""Longest time that a connection may take to open."""
PROBE_SECONDS = 2.0
"""Time in which a probe must be answered."""
DELAYS_KEPT = 100
"""Number of answers whose delays are kept."""
FIRST_HEDGE_SECONDS = 0.05
"""Delay after which another replica is asked as well, before enough delays are known."""
LEAST_HEDGE_SECONDS = 0.002
"""Shortest such delay: a hedge costs another search."""

T = TypeVar("T")


def call(method: str, params: Params, kind: type[T]) -> Call[T]:
    """A call whose result is of a type of ``messages``."""
    decode: Callable[[msgspec.Raw], T] = decoder(kind)  # type: ignore[arg-type]  # it is hashable
    return Call(method, params, decode)


@cache
def decoder(kind: Any) -> Any:
    """The decoder of a type: to make one takes 10 µs."""
    return msgspec.json.Decoder(kind).decode


class Replica:
    """One replica. ``clock`` is in seconds, as ``time.monotonic``."""

    def __init__(
        self,
        registered: Registered,
        token: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registered = registered
        self.client = SplitClient(registered.address, token=token, timeout=CONNECT_SECONDS)
        self.position: WirePosition | None = None
        """Its last known position: its present one is not older."""
        self.lag_seconds = 0.0
        self.time_outs = 0
        """Time-outs in a row."""
        self.error: SyncdError | None = None
        """Why the last request got no answer; None if it got one."""
        self.answered_at = float("-inf")
        self._clock = clock
        self._delays: deque[float] = deque(maxlen=DELAYS_KEPT)
        self._hedge_seconds = FIRST_HEDGE_SECONDS
        self._noted = 0

    @property
    def name(self) -> str:
        """Its consumer's name."""
        return self.registered.consumer

    @property
    def is_open(self) -> bool:
        """Whether only probes are sent to it."""
        return self.time_outs >= TIME_OUTS

    @property
    def hedge_seconds(self) -> float:
        """Delay after which another replica is asked as well: the 95th percentile of its own."""
        return self._hedge_seconds

    def begin(self, asked: Call[Any]) -> Sent | None:
        """Send a request now, if there is an open connection: a task of its own costs more."""
        return self.client.begin(asked)

    def take(self, asked: Call[T], sent: Sent) -> T:
        """The answer that is there, and is not an error; raises ``ServiceUnavailable``."""
        found = take_result(asked, sent.future.result())
        self._answered()
        self._check(found)
        self._note_delay(monotonic() - sent.began)
        return found

    async def ask(self, asked: Call[T], seconds: float | None, sent: Sent | None = None) -> T:
        """Send a request; the answer must come within ``seconds``, None for no limit.

        ``sent`` is the request, if it was sent already. Raises the service's error,
        ``ServiceUnavailable``, or ``NoAnswer`` after ``seconds``.
        """
        patience = None if seconds is None else seconds - CONNECT_SECONDS
        begun = self._clock() if sent is None else sent.began
        granted = None if seconds is None else seconds + self._clock() - begun
        try:
            if sent is not None:
                found = await self.client.end(asked, sent, seconds)
            else:
                found = await self.client.run(replace(asked, patience_seconds=patience))
        except NoAnswer as error:
            self.error = error
            if granted is not None and granted >= LEAST_TIME_OUT_SECONDS:
                self.time_outs += 1
            raise
        except ServiceUnavailable as error:
            self.error = error
            raise
        except SyncdError:
            self._answered()
            raise
        self._answered()
        self._check(found)
        self._note_delay(self._clock() - begun)
        return found

    async def probe(self) -> None:
        """Ask for its status, which it answers at once. It does not raise."""
        try:
            status = await self.ask(
                replace(calls.status(), decode=msgspec.json.Decoder(ServiceStatus).decode),
                PROBE_SECONDS,
            )
        except SyncdError as error:
            self.error = self.error or error
        else:
            self.position, self.lag_seconds = status.position, status.lag_seconds

    def is_due(self, seconds: float) -> bool:
        """Whether it has not answered for ``seconds``, so that a probe is due."""
        return self._clock() - self.answered_at >= seconds

    def note(self, position: WirePosition, lag_seconds: float) -> None:
        """Note the position of an answer."""
        self.position, self.lag_seconds = position, lag_seconds

    async def close(self) -> None:
        """Close its connection."""
        await self.client.close()

    def _check(self, found: object) -> None:
        """Raise ``ServiceUnavailable`` if another shard answers at the address."""
        wanted = self.registered.shard.name
        positions = getattr(found, "positions", None)
        other = getattr(found, "shard", None) or next(iter(positions or ()), wanted)
        if other != wanted:
            self.error = ServiceUnavailable(
                f"shard {other} answers on {self.registered.address}, where shard {wanted} has "
                "registered",
                hint="start it; or, if it is gone for good, delete its row in syncd.consumers",
            )
            raise self.error

    def _answered(self) -> None:
        self.time_outs, self.error = 0, None
        self.answered_at = self._clock()

    def _note_delay(self, seconds: float) -> None:
        self._delays.append(seconds)
        self._noted += 1
        if self._noted % 16 == 0:  # sorting 100 numbers takes 5 µs
            delays: list[Any] = sorted(self._delays)
            self._hedge_seconds = max(delays[len(delays) * 95 // 100], LEAST_HEDGE_SECONDS)
