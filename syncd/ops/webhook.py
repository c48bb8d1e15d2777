"""The webhook: each alert is POSTed as JSON to ``SYNCD_WEBHOOK_URL``.

No other task waits for it. An alert is tried a few times, then dropped with a line in the log.
The URL is often a secret: the log holds only its host.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from urllib.parse import SplitResult, unquote, urlsplit

import anyio
import msgspec
import structlog
from anyio.abc import ByteStream

from syncd.ops.parts import Parts
from syncd.sync.registry.alerts import Alert

LOOK_SECONDS = 0.5
ANSWER_SECONDS = 10.0
RETRY_SECONDS = (1.0, 5.0, 30.0, 120.0)
STOP_SECONDS = 2.0
STATUS_LINE_BYTES = 1024

logger = structlog.get_logger()


class Webhook:
    """Sends alerts to one address, one at a time."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.alerts = parts.consumer.registry.alerts
        self.url = urlsplit(parts.settings.webhook_url.get_secret_value())
        self.telling = anyio.Lock()

    async def run(self) -> None:
        """Send the waiting alerts, until cancelled."""
        while True:
            await self.tell()
            self.parts.consumer.registry.tasks.well("webhook")
            await anyio.sleep(LOOK_SECONDS)

    async def stop(self) -> None:
        """Send the alerts of the stop itself, such as a failed checkpoint, for at most a moment."""
        with anyio.move_on_after(STOP_SECONDS):
            await self.tell()

    async def tell(self) -> None:
        """Send alerts until none waits."""
        async with self.telling:
            while self.alerts.waiting:
                await self.send(self.alerts.waiting.popleft())

    async def send(self, alert: Alert) -> None:
        """Try a few times; an alert that does not arrive is logged and dropped."""
        body = self.body(alert)
        for delay in (*RETRY_SECONDS, None):
            try:
                with anyio.fail_after(ANSWER_SECONDS):
                    status = await post(self.url, body)
                if 200 <= status < 300:
                    return
                reason = f"it answered {status}"
            except (
                OSError,
                ValueError,
                anyio.EndOfStream,
                anyio.BrokenResourceError,
            ) as error:  # with TimeoutError, SSLError
                reason = str(error) or type(error).__name__
            if delay is not None:
                await anyio.sleep(delay)
        logger.warning(
            "webhook_failed",
            alert=alert.event,
            text=alert.text,
            host=self.url.hostname,
            reason=reason,
        )

    def body(self, alert: Alert) -> bytes:
        """Body of the POST. Chat services show its ``text``."""
        consumer: Mapping[str, object] = {"consumer": self.parts.settings.consumer}
        text = f"syncd {self.parts.settings.consumer}: {alert.text}"
        return msgspec.json.encode(
            {"event": alert.event, "text": text, "at": alert.at, **consumer, **alert.facts}
        )


async def post(url: SplitResult, body: bytes) -> int:
    """HTTP status of the answer to a POST; redirects are not followed.

    Raises ``OSError``, ``ValueError`` and anyio's stream errors.
    """
    encrypted, host = url.scheme == "https", url.hostname or ""
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    head = [
        f"POST {path} HTTP/1.1",
        f"Host: {url.netloc.rpartition('@')[2]}",
        "Content-Type: application/json",
    ]
    if url.username is not None:
        user = f"{unquote(url.username)}:{unquote(url.password or '')}".encode()
        head.append(f"Authorization: Basic {base64.b64encode(user).decode()}")
    head += [f"Content-Length: {len(body)}", "User-Agent: syncd", "Connection: close", "", ""]
    port = url.port or (443 if encrypted else 80)
    stream: ByteStream
    if encrypted:
        stream = await anyio.connect_tcp(host, port, tls=True, tls_standard_compatible=False)
    else:
        stream = await anyio.connect_tcp(host, port)
    async with stream:
        await stream.send("\r\n".join(head).encode() + body)
        answer = b""
        while b"\n" not in answer and len(answer) < STATUS_LINE_BYTES:
            answer += await stream.receive()
    version, _, rest = answer.partition(b" ")
    if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise ValueError("the answer is not HTTP")
    return int(rest[:3])
