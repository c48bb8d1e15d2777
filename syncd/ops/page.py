"""The status page: one HTML document without foreign assets, readable without JavaScript.

It fits a phone and a screen. Text from a row, a log or a request goes through ``escape``. The
policy in the header allows only the page's own style and script.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from inspect import isawaitable
from typing import Any

import msgspec

from syncd.errors import InvalidParams, SyncdError
from syncd.log import recent_events
from syncd.ops.charts import chart
from syncd.ops.history import Sample
from syncd.ops.page_style import SCRIPT, STYLE
from syncd.ops.parts import Parts
from syncd.ops.readiness import Verdict
from syncd.protocol.messages import SearchParams, SearchResult, WireKey
from syncd.protocol.status_messages import DatasetStatus
from syncd.types import KeyKind

DATASETS_SHOWN = 200
EVENTS_SHOWN = 30
ROWS_SHOWN = 10
NEAREST = 10
HEAD = (
    "Dataset",
    "State",
    "Rows",
    "Tombstones",
    "Dim",
    "Index",
    "Recall",
    "Memory",
    "Disk",
    "Lag",
    "Checkpoint",
    "Last verify",
)
NUMBERS = frozenset({"Rows", "Tombstones", "Dim", "Memory", "Disk", "Lag"})
LOG_FIELDS = ("event", "level", "timestamp")


@dataclass(frozen=True, slots=True)
class View:
    """Facts that the page shows."""

    parts: Parts
    verdict: Verdict
    samples: Sequence[Sample]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The search box: a dataset and a key, as the user typed them."""

    dataset: str
    key: str


async def find(parts: Parts, wanted: Wanted) -> SearchResult | SyncdError | None:
    """The rows nearest to the wanted row; None if the request names no row."""
    if not wanted.dataset or not wanted.key:
        return None
    try:
        kind = parts.methods.registry.find(wanted.dataset).source.key_kind
        params = SearchParams(dataset=wanted.dataset, key=typed_key(kind, wanted.key), k=NEAREST)
        params.check()
        found = parts.methods.counted_search(params)
        return await found if isawaitable(found) else found
    except SyncdError as error:
        return error


def typed_key(kind: KeyKind, text: str) -> WireKey:
    """A typed key, in the form of its dataset's kind of key; raises ``InvalidParams``."""
    if kind != "composite":
        return text
    try:
        return msgspec.json.decode(text, type=list[int | str | float | bool | None])
    except msgspec.DecodeError:
        raise InvalidParams(
            f"{text[:60]!r} is not a composite key", hint='write it as JSON, for example [1, "a"]'
        ) from None


def whole(view: View, wanted: Wanted, found: SearchResult | SyncdError | None) -> str:
    """The document."""
    settings = view.parts.settings
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>syncd {escape(settings.consumer)}</title><style>{STYLE}</style></head><body>"
        f'<p class="soft">syncd {escape(view.parts.status.version)}'
        f" · consumer {escape(settings.consumer)}</p>"
        '<p id="lost" class="bad" hidden>syncd does not answer. This is the last known state.</p>'
        f'<main id="live">{live(view)}</main>{search_box(view, wanted, found)}'
        f"<script>{SCRIPT}</script></body></html>"
    )


def live(view: View) -> str:
    """The part of the page that the script refreshes."""
    listed = view.parts.status.indexed()
    return "".join(
        (
            headline(view, listed),
            facts(view),
            datasets(view, listed),
            charts(view.samples),
            quarantine(view),
            events(),
        )
    )


def headline(view: View, listed: Sequence[DatasetStatus]) -> str:
    """In sync, or how far behind, and the problems."""
    verdict, consumer = view.verdict, view.parts.consumer
    if verdict.reasons:
        text, tone = "Not ready", "bad"
    elif not consumer.connected:
        text, tone = f"Database out of reach; answers are {ago(verdict.stale_seconds)} old", "bad"
    elif verdict.stale_seconds > 0:
        text, tone = f"{ago(verdict.stale_seconds)} behind", "bad"
    elif view.parts.consumer.registry.tasks.listed():
        text, tone = "A background task fails", "bad"
    elif any(one.in_sync is False for one in listed):
        text, tone = "A dataset differs from its table", "bad"
    elif not listed:
        text, tone = "In sync; nothing is indexed yet", "good"
    else:
        text, tone = "In sync", "good"
    return f'<h1 class="{tone}">{escape(text)}</h1>{bullets([*verdict.reasons, *verdict.remarks])}'


def facts(view: View) -> str:
    """The service in a few numbers."""
    status, outbox_rows = view.parts.status.service(), view.parts.rotator.outbox_rows
    saved, verify = status.checkpoint, status.verify
    checkpoint = "none yet" if saved.at is None else f"{since(saved.at)} ago"
    if saved.error:
        checkpoint += f"; the last one failed: {saved.error}"
    verified = "none yet"
    if verify is not None and verify.at is not None:
        verified = f"{since(verify.at)} ago{', and late' if verify.overdue else ''}"
    rows = {
        "State": status.state,
        "Changes waiting": f"{status.lag_rows or 0:,} rows, {status.lag_seconds:.1f} s",
        "Checkpoint": checkpoint,
        "Whole verify": verified,
        "Notifications": "listening" if status.listener_connected else "not listening: polling",
        "Outbox": "not counted yet" if outbox_rows is None else f"at most {outbox_rows:,} rows",
        "Quarantine": f"{status.quarantined:,} rows",
        "Running for": ago(status.uptime_seconds),
        "Position": status.position.snapshot if status.position else "",
    }
    return (
        "<dl>"
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in rows.items())
        + "</dl>"
    )


def datasets(view: View, listed: Sequence[DatasetStatus]) -> str:
    """One line per dataset, those with problems first."""
    order = sorted(
        listed, key=lambda one: (one.state == "ready" and not one.lag_seconds, one.dataset)
    )
    saved_at = saved_datasets(view)
    rows = []
    for one in order[:DATASETS_SHOWN]:
        verify = "not yet"
        if one.verified_at is not None:
            verify = f"{'in sync' if one.in_sync else 'DIFFERED'}, {since(one.verified_at)} ago"
        tone = (
            "good"
            if one.state == "ready"
            else "bad"
            if one.state in ("failed", "must_rebuild")
            else "soft"
        )
        recall = "" if one.recall is None else f"{one.recall:.3f}"
        if one.recall_of is not None and one.recall_p5 is not None:
            recall += f"<br><small>p5 {one.recall_p5:.2f}, of {one.recall_of}</small>"
        about = escape(f"{one.source}, {one.metric}")
        rows.append(
            "<tr>"
            f'<td class="name">{escape(one.dataset)}<br><small>{about}</small></td>'
            f'<td class="{tone}">{escape(one.state)}</td>'
            f'<td class="n">{one.count:,}</td>'
            f'<td class="n">{one.tombstones:,}</td>'
            f'<td class="n">{"" if one.dim is None else one.dim}</td>'
            f"<td>{escape(one.index or '')}</td>"
            f"<td>{recall}</td>"
            f'<td class="n">{size(one.bytes_memory)}</td>'
            f'<td class="n">{size(one.bytes - one.bytes_memory)}</td>'
            f'<td class="n">{one.lag_seconds:.1f} s</td>'
            f"<td>{saved_at.get(one.dataset, 'not yet')}</td>"
            f"<td>{escape(verify)}</td>"
            "</tr>"
        )
    left = len(order) - len(rows)
    more = (
        f'<p class="soft">and {left:,} more: <a href="/status">/status</a></p>' if left > 0 else ""
    )
    retired = len(view.parts.consumer.registry.retired)
    more += f'<p class="soft">and {retired:,} without rows</p>' if retired else ""
    if not rows:
        return "<h2>Datasets</h2><p>None. Attach a table: <code>syncd attach TABLE</code></p>"
    titles = "".join(
        f'<th class="n">{text}</th>' if text in NUMBERS else f"<th>{text}</th>" for text in HEAD
    )
    return f"<h2>Datasets</h2>{table(titles, rows)}{more}"


def saved_datasets(view: View) -> dict[str, str]:
    """Age of each dataset's checkpoint, for the datasets that are in the newest checkpoint."""
    newest, at = view.parts.checkpointer.store.newest, view.parts.checkpointer.last_success_at
    if newest is None or at is None:
        return {}
    return dict.fromkeys(
        (each.name for source in newest.sources for each in source.datasets), f"{since(at)} ago"
    )


def charts(samples: Sequence[Sample]) -> str:
    """The charts of the last hour."""
    if not samples:
        return (
            "<h2>Last hour</h2>"
            '<p class="soft">The first sample comes ten seconds after the start.</p>'
        )
    drawn = (
        chart("Lag", "s", [("", [(one.at, one.lag_seconds) for one in samples])]),
        chart("Rows applied", "/s", [("", [(one.at, one.applied_per_second) for one in samples])]),
        chart("Searches", "/s", [("", [(one.at, one.searches_per_second) for one in samples])]),
        chart(
            "Search time",
            "ms",
            [
                ("p50", [(one.at, one.p50_seconds) for one in samples]),
                ("p99", [(one.at, one.p99_seconds) for one in samples]),
            ],
        ),
    )
    return f'<h2>Last hour</h2><div class="charts">{"".join(drawn)}</div>'


def quarantine(view: View) -> str:
    """Number of rows in quarantine by dataset, and the newest rows with their reasons."""
    counts = view.parts.reporter.quarantined.most_common(EVENTS_SHOWN)
    if not counts:
        return ""
    lines = [f"{name or 'without a dataset'}: {rows:,} rows" for name, rows in counts]
    reasons = view.parts.consumer.registry.quarantined.most_common(EVENTS_SHOWN)
    lines += [f"{source}, {reason}: {rows:,} rows" for (source, reason), rows in reasons]
    newest = sorted(
        view.parts.reporter.quarantine.items(), key=lambda item: item[1].since, reverse=True
    )[:ROWS_SHOWN]
    titles = "<th>Dataset</th><th>Key</th><th>Reason</th><th>Since</th>"
    rows = (
        f'<tr><td class="name">{escape(row.dataset)}</td><td class="name">{escape(str(key))}</td>'
        f"<td>{escape(row.reason)}</td><td>{since(row.since)} ago</td></tr>"
        for (_, key), row in newest
    )
    return (
        f"<h2>Quarantine</h2>{bullets(lines)}{table(titles, rows)}"
        '<p class="soft">All of them: the view <code>syncd.quarantine</code></p>'
    )


def events() -> str:
    """The newest events of the log."""
    rows = []
    for event in list(recent_events)[: -EVENTS_SHOWN - 1 : -1]:
        others = (f"{name}: {value}" for name, value in event.items() if name not in LOG_FIELDS)
        rows.append(
            f"<tr><td>{escape(event.get('timestamp', '')[11:19])}</td>"
            f"<td>{escape(event.get('level', ''))}</td>"
            f'<td class="name"><b>{escape(event.get("event", ""))}</b>'
            f" {escape(', '.join(others))}</td></tr>"
        )
    return f"<h2>Events</h2>{table('', rows)}"


def search_box(view: View, wanted: Wanted, found: SearchResult | SyncdError | None) -> str:
    """Search for the rows nearest to a given row."""
    names = sorted(one.name for one in view.parts.consumer.registry.listed())[:DATASETS_SHOWN]
    options = "".join(f'<option value="{escape(name)}">' for name in names)
    form = (
        '<h2 id="search">Rows like this one</h2><form action="/#search" method="get">'
        '<input name="dataset" list="names" placeholder="dataset" aria-label="dataset"'
        f' value="{escape(wanted.dataset)}" required>'
        f'<datalist id="names">{options}</datalist>'
        '<input name="key" placeholder="key" aria-label="key"'
        f' value="{escape(wanted.key)}" required><button>Search</button></form>'
    )
    if found is None:
        return form
    if isinstance(found, SyncdError):
        return (
            f'{form}<p class="bad" role="alert">{escape(found.message)}'
            f"<br><small>{escape(found.hint)}</small></p>"
        )
    rows = "".join(
        f'<tr><td class="name">{escape(shown_key(key))}</td><td class="n">{distance:.6f}</td></tr>'
        for key, distance in zip(found.keys, found.distances, strict=True)
    )
    return f'{form}<table id="found"><tr><th>Key</th><th class="n">Distance</th></tr>{rows}</table>'


def shown_key(key: str | int | list[Any]) -> str:
    """A key as a user types it."""
    return key if isinstance(key, str) else msgspec.json.encode(key).decode()


def table(titles: str, rows: Iterable[str]) -> str:
    """A table that scrolls by itself on a narrow screen; without titles if they are empty."""
    head = f"<tr>{titles}</tr>" if titles else ""
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def bullets(lines: Iterable[str]) -> str:
    """A list; nothing if it is empty."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def since(at: datetime) -> str:
    """Time since a moment, for people."""
    return ago((datetime.now(UTC) - at).total_seconds())


def ago(seconds: float) -> str:
    """A duration in its largest suitable unit."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < length * (120 if unit != "h" else 48):
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def size(number: float) -> str:
    """Bytes in their largest suitable unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
