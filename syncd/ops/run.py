"""Tasks that only observe: they start, run and stop with the service, in its task group."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio.abc import TaskGroup

from syncd.ops.history import History
from syncd.ops.notify import keep_watchdog, notify
from syncd.ops.parts import Parts
from syncd.ops.readiness import Readiness
from syncd.ops.webhook import Webhook
from syncd.settings import OFF

if TYPE_CHECKING:
    from syncd.ops.http import Http

STOP_SECONDS = 5.0


class Ops:
    """HTTP from before the first connection to the database until after the last checkpoint.

    The other tasks begin when the database has been reached.
    """

    def __init__(self, parts: Parts) -> None:
        self.tasks = parts.consumer.registry.tasks
        self.readiness = Readiness(parts)
        self.history = History(parts)
        self.http: Http | None = None
        if parts.settings.http != OFF:
            # Imported late: the web server takes a fifth of a start's time.
            from syncd.ops.http import Http
            from syncd.ops.metrics import Metrics

            self.http = Http(parts, self.readiness, self.history, Metrics(parts))
        self.webhook = Webhook(parts) if parts.settings.webhook_url.get_secret_value() else None

    async def start(self, tasks: TaskGroup) -> None:
        """Open the HTTP port; raises ``AddressInUse`` or ``SettingsError``."""
        if self.http is not None:
            await tasks.start(partial(self.tasks.keep_started, "http", self.http.serve))

    def observe(self, tasks: TaskGroup) -> None:
        """Start the tasks that need a database that has been reached."""
        tasks.start_soon(self.tasks.keep, "history", self.history.run)
        tasks.start_soon(self.tasks.keep, "watchdog", keep_watchdog)
        if self.webhook is not None:
            tasks.start_soon(self.tasks.keep, "webhook", self.webhook.run)

    def stopping(self) -> None:
        """Report that the service stops and that balancers should use another one."""
        self.readiness.stopping = True
        notify("STOPPING=1")

    async def stop(self) -> None:
        """Send the alerts of the last checkpoint, then close the HTTP port as the last part."""
        if self.webhook is not None:
            await self.webhook.stop()
        if self.http is not None:
            self.http.stop()
            with anyio.move_on_after(STOP_SECONDS):
                await self.http.stopped.wait()
