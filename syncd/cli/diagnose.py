"""Commands that explain problems: check and why."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from syncd.cli.options import DataDir, Dsn, Embedded, Json, Socket
from syncd.cli.output import print_json
from syncd.cli.session import database
from syncd.ops.findings import Finding
from syncd.settings import Settings, load_settings, service_socket

if TYPE_CHECKING:
    from syncd.ops.why import Explanation

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
INDENT = 6


def check(
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Check everything that syncd depends on: each line is ok, warn or fail, with the fix. Changes
    nothing. Exits 1 only if a line is fail.

    Example: syncd check
    """
    # imported here, so that other commands start without it
    from syncd.ops.check import examine

    settings = load_settings(dsn=dsn, data_dir=data_dir)
    with database(settings, embedded=embedded) as found:
        findings = examine(found, socket_of(settings, socket, data_dir_given=data_dir is not None))
    if json:
        print_json(findings)
    else:
        print_findings(findings)
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)


def why(
    dataset: Annotated[
        str, typer.Argument(help="The dataset; the project default may be left out.")
    ],
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Explain why a dataset is behind or wrong, and what to do: the most likely cause first.

    Example: syncd why chunks
    """
    from syncd.ops.why import explain

    settings = load_settings(dsn=dsn, data_dir=data_dir)
    with database(settings, embedded=embedded) as found:
        explanation = explain(
            found, socket_of(settings, socket, data_dir_given=data_dir is not None), dataset
        )
    if json:
        print_json(explanation)
    else:
        print_explanation(explanation)
    if not explanation.known:
        raise typer.Exit(1)


def print_explanation(explanation: Explanation) -> None:
    """Print the facts, then the numbered causes, each with its command."""
    unknown = "" if explanation.known else ": there is no dataset of this name"
    lines = [Text(f"{plain(explanation.dataset)}{unknown}", style="bold")]
    width = max((len(fact.what) for fact in explanation.facts), default=0)
    lines += [
        Text("  ").append(f"{fact.what:<{width}}  ", style="bold").append(plain(fact.value))
        for fact in explanation.facts
    ]
    lines.append(Text(""))
    if not explanation.causes:
        lines.append(Text("nothing is wrong", style=STYLES["ok"]))
    for number, cause in enumerate(explanation.causes, 1):
        lines.append(
            Text(f"{number}. ")
            .append(plain(cause.what), style=STYLES[cause.level])
            .append(f": {plain(cause.detail)}")
        )
        lines.append(Text(f"   next: {plain(cause.fix)}"))
    print_lines(lines)


def socket_of(settings: Settings, socket: str | None, *, data_dir_given: bool) -> str:
    """The service's socket: the given one, the given data directory's, or the default."""
    if socket:
        return socket
    return str(settings.socket_path if data_dir_given else service_socket())


def print_findings(findings: Sequence[Finding]) -> None:
    """Print one line per finding, with its fix below."""
    width = max((len(finding.what) for finding in findings if len(finding.what) <= 40), default=0)
    lines = []
    for finding in findings:
        line = Text(f"{finding.level:<{INDENT}}", style=STYLES[finding.level])
        line.append(f"{plain(finding.what):<{width}}  ", style="bold not dim").append(
            plain(finding.detail), style="none"
        )
        lines.append(line)
        if finding.fix and finding.level != "ok":
            lines.append(Text(" " * INDENT + "fix: " + plain(finding.fix)))
    print_lines(lines)


def print_lines(lines: Iterable[Text]) -> None:
    """Print lines that only the terminal wraps.

    They have colours if stdout is a terminal with colours, and NO_COLOR is not set.
    """
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    for line in lines:
        console.print(line)


def plain(text: str) -> str:
    """Text on one line, without control characters.

    Text such as a session's query comes from other programs: a terminal would execute its escapes.
    """
    return "".join(character if character.isprintable() else " " for character in text)
