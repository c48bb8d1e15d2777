"""The status page: one HTML document without assets of others, for a phone as well as a screen, readable without JavaScript.

Whatever comes from a row, a log or a request goes through ``escape``; the policy in the header lets the page's own style and script run and nothing
else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from inspect import isawaitable

import msgspec

from syncd.errors import InvalidParams, SyncdError
from syncd.log import recent_events
from syncd.ops.charts import chart
from syncd.ops.history import Sample
from syncd.ops.parts import Parts
from syncd.ops.readiness import Verdict
from syncd.protocol.messages import DatasetStatus, NoParams, SearchParams, SearchResult, WireKey
from syncd.types import DatasetName, KeyKind

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
FACTS_OF_LOGGING = ("event", "level", "timestamp")

STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1c2024;--soft:#60646c;--line:#d9d9e0;--good:#18794e;--bad:#b4232c;--mark:#0d74ce;--two:#b35c00}
@media(prefers-color-scheme:dark){:root{--back:#111113;--text:#edeef0;--soft:#b0b4ba;--line:#363a3f;--good:#3dd68c;--bad:#ff9592;--mark:#70b8ff;--two:#ffa057}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--back);color:var(--text);font:16px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
.good{color:var(--good)}.bad{color:var(--bad)}small,.soft{color:var(--soft)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--line);white-space:nowrap}
td.name{white-space:normal;overflow-wrap:anywhere;min-width:9rem}td.n,th.n{text-align:right}
ul{padding-left:1.2rem;margin:.3rem 0}li{overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.6rem;margin:.8rem 0}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:1rem;align-items:end}
figure{margin:0}figcaption{font-size:.9rem}
svg{width:100%;height:5.6rem;display:block}polyline{fill:none;stroke:var(--mark);stroke-width:1.5;vector-effect:non-scaling-stroke}
polyline.s1{stroke:var(--two)}line{stroke:var(--line)}
form{display:flex;flex-wrap:wrap;gap:.5rem}
input,button{font:inherit;padding:.35rem .5rem;color:inherit;background:transparent;border:1px solid var(--line);border-radius:.3rem}
input{min-width:0;max-width:100%}
button{border-color:var(--mark);cursor:pointer}
"""

SCRIPT = """
const lost=document.getElementById("lost");
setInterval(async()=>{if(document.hidden)return;try{const answer=await fetch("/live");
if(answer.ok)document.getElementById("live").innerHTML=await answer.text();lost.hidden=answer.ok}catch{lost.hidden=false}},3000);
"""


def source_hash(text: str) -> str:
    """How a content security policy names an inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


SECURITY_POLICY = (
    f"default-src 'none'; style-src {source_hash(STYLE)}; script-src {source_hash(SCRIPT)}; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class View:
    """What is shown."""

    parts: Parts
    verdict: Verdict
    samples: Sequence[Sample]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The search box: a dataset and a key, as they were typed."""

    dataset: str
    key: str


async def find(parts: Parts, wanted: Wanted) -> SearchResult | SyncdError | None:
    """The rows like the one that was asked for; None where none was."""
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
    """A key as it was typed, by its dataset's kind; raises ``InvalidParams``."""
    if kind != "composite":
        return text
    try:
        return msgspec.json.decode(text, type=list[int | str | float | bool | None])
    except msgspec.DecodeError:
        raise InvalidParams(
            f"{text[:60]!r} is no composite key", hint='write it as JSON, for example [1, "a"]'
        ) from None


def whole(view: View, wanted: Wanted, found: SearchResult | SyncdError | None) -> str:
    """The document."""
    settings = view.parts.settings
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>syncd {escape(settings.consumer)}</title><style>{STYLE}</style></head><body>"
        f'<p class="soft">syncd {escape(view.parts.methods.version)} · consumer {escape(settings.consumer)}</p>'
        '<p id="lost" class="bad" hidden>syncd does not answer. This is the last known state.</p>'
        f'<main id="live">{live(view)}</main>{search_box(view, wanted, found)}'
        f"<script>{SCRIPT}</script></body></html>"
    )


def live(view: View) -> str:
    """All that changes by itself."""
    listed = view.parts.methods.dataset_statuses()
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
    """In step, or how far behind, and what is amiss."""
    verdict, consumer = view.verdict, view.parts.consumer
    if verdict.reasons:
        text, tone = "Not ready", "bad"
    elif not consumer.connected:
        text, tone = f"Database out of reach; answers are {ago(verdict.stale_seconds)} old", "bad"
    elif verdict.stale_seconds > 0:
        text, tone = f"{ago(verdict.stale_seconds)} behind", "bad"
    elif view.parts.consumer.registry.tasks.listed():
        text, tone = "A background task fails", "bad"
    elif drifted(view):
        text, tone = "A dataset differs from its table", "bad"
    elif not listed:
        text, tone = "In sync; nothing is indexed yet", "good"
    else:
        text, tone = "In sync", "good"
    return f'<h1 class="{tone}">{escape(text)}</h1>{bullets([*verdict.reasons, *verdict.remarks])}'


def drifted(view: View) -> list[str]:
    """Datasets that were not in sync when they were last compared."""
    return [name for name, (_, in_sync) in list(view.parts.verifier.last.items()) if not in_sync]


def facts(view: View) -> str:
    """The service in a few numbers."""
    status, checkpointer = view.parts.methods.status(NoParams()), view.parts.checkpointer
    outbox_rows, late = view.parts.rotator.outbox_rows, view.parts.verifier.overdue
    saved = checkpointer.last_success_at
    checkpoint = "none yet" if saved is None else f"{since(saved)} ago"
    if checkpointer.last_error:
        checkpoint += f"; the last one failed: {checkpointer.last_error}"
    rows = {
        "State": status.state,
        "Changes waiting": f"{status.lag_rows or 0:,} rows, {status.lag_seconds:.1f} s",
        "Checkpoint": checkpoint,
        "Whole verify": "none yet"
        if late.at is None
        else f"{since(late.at)} ago{', and late' if late.reason else ''}",
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
    """One line a dataset, those that need a look first."""
    verified: Mapping[DatasetName, tuple[datetime, bool]] = dict(view.parts.verifier.last)
    order = sorted(
        listed, key=lambda one: (one.state == "ready" and not one.lag_seconds, one.dataset)
    )
    saved_at = saved_datasets(view)
    rows = []
    for one in order[:DATASETS_SHOWN]:
        at = verified.get(DatasetName(one.dataset))
        verify = (
            "not yet" if at is None else f"{'in sync' if at[1] else 'DIFFERED'}, {since(at[0])} ago"
        )
        tone = (
            "good"
            if one.state == "ready"
            else "bad"
            if one.state in ("failed", "must_rebuild")
            else "soft"
        )
        numbers = (f"{one.count:,}", f"{one.tombstones:,}", "" if one.dim is None else str(one.dim))
        rows.append(
            f'<tr><td class="name">{escape(one.dataset)}<br><small>{escape(one.source)}, {escape(one.metric)}</small></td>'
            f'<td class="{tone}">{escape(one.state)}</td>'
            + "".join(f'<td class="n">{number}</td>' for number in numbers)
            + f"<td>{escape(one.index or '')}</td><td>{'' if one.recall is None else f'{one.recall:.3f}'}</td>"
            f'<td class="n">{size(one.bytes_memory)}</td><td class="n">{size(one.bytes - one.bytes_memory)}</td>'
            f'<td class="n">{one.lag_seconds:.1f} s</td><td>{saved_at.get(one.dataset, "not yet")}</td><td>{escape(verify)}</td></tr>'
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
    return f'<h2>Datasets</h2><div class="wide"><table><tr>{titles}</tr>{"".join(rows)}</table></div>{more}'


def saved_datasets(view: View) -> dict[str, str]:
    """How old the checkpoint of each dataset is that is in one."""
    newest, at = view.parts.checkpointer.store.newest, view.parts.checkpointer.last_success_at
    if newest is None or at is None:
        return {}
    return dict.fromkeys(
        (each.name for source in newest.sources for each in source.datasets), f"{since(at)} ago"
    )


def charts(samples: Sequence[Sample]) -> str:
    """The last hour."""
    if not samples:
        return '<h2>Last hour</h2><p class="soft">The first sample comes ten seconds after the start.</p>'
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
    """How many rows of which dataset cannot be indexed, and the newest of them with the reason."""
    counts = view.parts.reporter.quarantined.most_common(EVENTS_SHOWN)
    if not counts:
        return ""
    lines = [f"{name or 'without a dataset'}: {rows:,} rows" for name, rows in counts]
    reasons = view.parts.consumer.registry.quarantined.most_common(EVENTS_SHOWN)
    lines += [f"{source}, {reason}: {rows:,} rows" for (source, reason), rows in reasons]
    newest = sorted(
        view.parts.reporter.quarantine.items(), key=lambda item: item[1].since, reverse=True
    )[:ROWS_SHOWN]
    rows = "".join(
        f'<tr><td class="name">{escape(row.dataset)}</td><td class="name">{escape(str(key))}</td>'
        f"<td>{escape(row.reason)}</td><td>{since(row.since)} ago</td></tr>"
        for (_, key), row in newest
    )
    return (
        f'<h2>Quarantine</h2>{bullets(lines)}<div class="wide"><table><tr><th>Dataset</th><th>Key</th><th>Reason</th><th>Since</th></tr>'
        f'{rows}</table></div><p class="soft">All of them: the view <code>syncd.quarantine</code></p>'
    )


def events() -> str:
    """What was logged last."""
    rows = "".join(
        f"<tr><td>{escape(event.get('timestamp', '')[11:19])}</td><td>{escape(event.get('level', ''))}</td>"
        f'<td class="name"><b>{escape(event.get("event", ""))}</b> '
        f"{escape(', '.join(f'{name}: {value}' for name, value in event.items() if name not in FACTS_OF_LOGGING))}</td></tr>"
        for event in list(recent_events)[: -EVENTS_SHOWN - 1 : -1]
    )
    return f'<h2>Events</h2><div class="wide"><table>{rows}</table></div>'


def search_box(view: View, wanted: Wanted, found: SearchResult | SyncdError | None) -> str:
    """Rows like a given one."""
    names = sorted(one.name for one in view.parts.consumer.registry.listed())[:DATASETS_SHOWN]
    options = "".join(f'<option value="{escape(name)}">' for name in names)
    form = (
        '<h2 id="search">Rows like this one</h2><form action="/#search" method="get">'
        f'<input name="dataset" list="names" placeholder="dataset" aria-label="dataset" value="{escape(wanted.dataset)}" required>'
        f'<datalist id="names">{options}</datalist>'
        f'<input name="key" placeholder="key" aria-label="key" value="{escape(wanted.key)}" required><button>Search</button></form>'
    )
    if found is None:
        return form
    if isinstance(found, SyncdError):
        return f'{form}<p class="bad" role="alert">{escape(found.message)}<br><small>{escape(found.hint)}</small></p>'
    rows = "".join(
        f'<tr><td class="name">{escape(key if isinstance(key, str) else msgspec.json.encode(key).decode())}</td>'
        f'<td class="n">{distance:.6f}</td></tr>'
        for key, distance in zip(found.keys, found.distances, strict=True)
    )
    return f'{form}<table id="found"><tr><th>Key</th><th class="n">Distance</th></tr>{rows}</table>'


def bullets(lines: Iterable[str]) -> str:
    """A list, if there is anything in it."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def since(at: datetime) -> str:
    """How long ago something was."""
    return ago((datetime.now(UTC) - at).total_seconds())


def ago(seconds: float) -> str:
    """A length of time in its largest fitting unit."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < length * (120 if unit != "h" else 48):
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def size(number: float) -> str:
    """Bytes in their largest fitting unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
