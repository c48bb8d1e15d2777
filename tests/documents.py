"""The documentation as text: prose, tables and code, and the prose in Python and SQL files."""

from __future__ import annotations

import ast
import io
import re
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import typer.main

from syncd.cli.main import app

CHECKOUT = Path(__file__).parents[1]
README = CHECKOUT / "README.md"
DOCS = CHECKOUT / "syncd" / "docs"
PAGES = (README, *sorted(DOCS.glob("*.md")))

Kind = Literal["prose", "table", "code"]


class Line(NamedTuple):
    """One line of a page."""

    number: int
    kind: Kind
    text: str


def lines(page: str) -> Iterator[Line]:
    """Each line of a page, with its kind; the fences of code count as code."""
    in_code = False
    for number, text in enumerate(page.splitlines(), 1):
        fence = text.lstrip().startswith("```")
        in_code ^= fence
        kind: Kind = "code" if in_code or fence else "table" if text.startswith("|") else "prose"
        yield Line(number, kind, text)


def cells(row: str) -> list[str]:
    """The cells of a row of a table."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def paragraphs(page: str) -> Iterator[str]:
    """Each paragraph and each item of a list, on one line."""
    collected: list[str] = []
    for line in [*lines(page), Line(0, "prose", "")]:
        begins = re.match(r"\s*([-*]|\d+\.) |#", line.text)
        if line.kind != "prose" or begins or not line.text.strip():
            if collected:
                yield " ".join(collected)
            collected = []
        if line.kind == "prose" and line.text.strip():
            collected.append(re.sub(r"^\s*([-*]|\d+\.) ", "", line.text).strip())


def words_of_sentences(paragraph: str) -> Iterator[list[str]]:
    """The words of each sentence. Code in backticks is one word; a link is its text."""
    plain = re.sub(r"`[^`]*`", "CODE", re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", paragraph))
    for sentence in re.split(r"(?<=[.!?])\s+", plain):
        yield [word for word in sentence.split() if re.search(r"\w", word)]


def anchors(page: str) -> set[str]:
    """Names that a link can have after ``#``."""
    headings = [
        line.text.lstrip("# ")
        for line in lines(page)
        if line.kind == "prose" and line.text.startswith("#")
    ]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(page: str) -> Iterator[str]:
    """Every command that begins with ``syncd``, in code blocks and in backticks."""
    code = "\n".join(
        line.text for line in lines(page) if line.kind == "code" and not line.text.startswith("```")
    )
    for text in code.replace("\\\n", " ").splitlines():
        yield from commands_in(text.removeprefix("$ "))
    prose = "\n".join(line.text for line in lines(page) if line.kind != "code")
    for text in re.findall(r"`([^`]+)`", prose):
        yield from commands_in(" ".join(text.split()))


def commands_in(text: str) -> Iterator[str]:
    """The commands of one line of a shell, without variables and comments."""
    for part in re.split(r"&&|\|\|?|;|&(?=\s|$)", re.sub(r"(^|\s)#.*", "", text)):
        command = re.sub(r"^\s*(\w+=\S*\s+)*(\S*/bin/)?", "", part).strip()
        if re.match(r"syncd( |$)", command):
            yield command


def fault_of(command: str) -> str:
    """The error of a command line, empty if it is valid. ``[…]`` marks optional parts."""
    try:
        words = shlex.split(re.sub(r"\[[^]]*\](\.\.\.)?", "", command).replace("...", ""))[1:]
    except ValueError as error:
        return str(error)
    program: Any = typer.main.get_command(app)  # of click, or of the copy of it that typer carries
    while hasattr(program, "commands") and words and not words[0].startswith("-"):
        if words[0] not in program.commands:
            return f"there is no command {words[0]}"
        program = program.commands[words.pop(0)]
    context = program.context_class(program, info_name="syncd")
    try:
        _, rest, _ = program.make_parser(context).parse_args(args=words)
    except Exception as error:  # noqa: BLE001  an error of either click
        return str(error) or type(error).__name__
    return f"too many arguments: {' '.join(rest)}" if rest else ""


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Prose of a file with line numbers.

    A page's prose and tables, strings and comments of Python, comments of SQL.
    """
    source = path.read_text("utf-8")
    if path.suffix == ".md":
        yield from (
            (line.number, re.sub(r"`[^`]*`", "``", line.text))
            for line in lines(source)
            if line.kind != "code"
        )
    elif path.suffix == ".py":
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.lineno, node.value
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    elif path.suffix == ".sql":
        yield from (
            (n, text.partition("--")[2])
            for n, text in enumerate(source.splitlines(), 1)
            if "--" in text
        )
