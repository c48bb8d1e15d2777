"""The webhook: each alert is POSTed as JSON to ``SYNCD_WEBHOOK_URL``.

It runs beside everything else and nothing waits for it. An alert is tried a few times, then let go with a line in the log. The URL is often a secret,
so nothing that is logged repeats more of it than its host.
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
    """Tells one address, one alert at a time."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.alerts = parts.consumer.registry.alerts
        self.url = urlsplit(parts.settings.webhook_url.get_secret_value())
        self.telling = anyio.Lock()

    async def run(self) -> None:
        """Tell what there is to tell, until cancelled."""
        while True:
            await self.tell()
            self.parts.consumer.registry.tasks.well("webhook")
            await anyio.sleep(LOOK_SECONDS)

    async def stop(self) -> None:
        """Tell what the stop itself gave rise to, such as a failed checkpoint, if that takes but a moment."""
        with anyio.move_on_after(STOP_SECONDS):
            await self.tell()

    async def tell(self) -> None:
        """Until nothing waits."""
        async with self.telling:
            while self.alerts.waiting:
                await self.send(self.alerts.waiting.popleft())

    async def send(self, alert: Alert) -> None:
        """Try a few times; what does not arrive is logged and forgotten."""
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
        """What is POSTed. ``text`` is what chat services show."""
        consumer: Mapping[str, object] = {"consumer": self.parts.settings.consumer}
        text = f"syncd {self.parts.settings.consumer}: {alert.text}"
        return msgspec.json.encode(
            {"event": alert.event, "text": text, "at": alert.at, **consumer, **alert.facts}
        )


async def post(url: SplitResult, body: bytes) -> int:
    """The status of the answer to a POST; redirects are not followed. Raises ``OSError``, ``ValueError`` and anyio's stream errors."""
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
        raise ValueError("what answers does not speak HTTP")
    return int(rest[:3])
