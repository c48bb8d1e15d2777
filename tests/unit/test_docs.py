"""The pages agree with the code, and text follows the rules that a program can check."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from syncd.settings import Settings
from syncd.sync.registry.quarantine import EXPLANATIONS
from tests.documents import (
    CHECKOUT,
    DOCS,
    PAGES,
    anchors,
    cells,
    command_lines,
    fault_of,
    lines,
    paragraphs,
    texts,
    words_of_sentences,
)
from tests.oracle.prove_traps import TRAPS
from tests.settings_page import PAGE, settings_table, with_current_table

WIDTH = 100
CELL = 120
SENTENCE_WORDS = 25
PLAIN_LANGUAGE = (
    "README.md",
    "syncd/docs/*.md",
    "syncd/**/*.py",
    "migrations/**/*.py",
    "tests/**/*.py",
    "sql/queries/*.sql",
    "sql/schema/0002_*.sql",
    "sql/schema/0003_*.sql",
    "sql/schema/0004_*.sql",
    "sql/triggers/0002_*.sql",
)
"""The files whose text is checked: globs of .md, .py (strings and comments) and .sql (comments)."""
NOT_PLAIN = re.compile(
    r"(?<!there )\bis no (?!longer\b)|\bso many\b|\banew\b|\bfor ever\b|\bwhoever\b"
    r"|(?<!['\w])(pass|index|process|outbox)'(?!s)",
    re.IGNORECASE,
)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def test_every_page_is_there() -> None:
    assert [page.stem for page in PAGES] == [
        "README",
        "apps",
        "architecture",
        "changelog",
        "cluster",
        "concepts",
        "contributing",
        "faults",
        "measurements",
        "operations",
        "settings",
        "sql",
        "use",
    ]


@each_page
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


@each_page
def test_every_command_exists_with_its_options(page: Path) -> None:
    assert {
        command: fault
        for command in command_lines(page.read_text("utf-8"))
        if (fault := fault_of(command))
    } == {}


def test_commands_are_found_and_wrong_ones_are_reported() -> None:
    found = [command for page in PAGES for command in command_lines(page.read_text("utf-8"))]
    assert len(found) > 80
    assert "syncd healthcheck" in found
    assert fault_of("syncd serve --twice").startswith("No such option: --twice")
    assert fault_of("syncd bench nothing") == "there is no command nothing"
    assert fault_of("syncd detach a b") == "too many arguments: b"


@each_page
def test_every_file_and_module_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    files = re.findall(r"(?<![\w/.-])((?:syncd|sql|tests|migrations|docker|\.ci)/[\w./-]*\w)", text)
    assert [
        name
        for name in files
        if not (CHECKOUT / name).exists() and not (page.parent / name).exists()
    ] == []
    modules = [
        name.replace(".", "/")
        for name in re.findall(r"(?:-m|from|import) ((?:syncd|tests)\.[\w.]+)", text)
    ]
    assert [
        name
        for name in modules
        if not (CHECKOUT / f"{name}.py").is_file() and not (CHECKOUT / name).is_dir()
    ] == []


@each_page
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"\bSYNCD_[A-Z_]*[A-Z]\b", page.read_text("utf-8")))
    assert sorted(named - {f"SYNCD_{name.upper()}" for name in Settings.model_fields}) == []


def test_the_settings_are_listed_as_they_are() -> None:
    text = PAGE.read_text("utf-8")
    assert text == with_current_table(text), "run: python -m tests.settings_page"


def test_the_table_shows_a_default_if_it_is_one_value() -> None:
    rows = {row.split("`")[1]: row for row in settings_table().splitlines()[2:]}
    assert rows["SYNCD_CHECKPOINT_SECONDS"].startswith("| `SYNCD_CHECKPOINT_SECONDS` | `60` |")
    assert rows["SYNCD_VERIFY_SECONDS"].startswith("| `SYNCD_VERIFY_SECONDS` | `86400` |")
    assert rows["SYNCD_TOKEN"].startswith("| `SYNCD_TOKEN` |  |")
    assert rows["SYNCD_DATA_DIR"].startswith("| `SYNCD_DATA_DIR` |  |")


def test_every_test_that_a_fault_names_is_in_the_files_of_its_section() -> None:
    """A name in the last column, to its ``…``, begins a test's name."""
    checked = 0
    for section in re.split(r"^#+ ", (DOCS / "faults.md").read_text("utf-8"), flags=re.MULTILINE):
        if "| test |" not in section:
            continue
        files = [CHECKOUT / name for name in re.findall(r"`(tests/[\w/]+\.py)`", section)]
        there = {
            node.name.removeprefix("test_")
            for file in files
            for node in ast.walk(ast.parse(file.read_text("utf-8")))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for row in [line.text for line in lines(section) if line.kind == "table"][2:]:
            names = re.findall(r"`([^`]+)`", cells(row)[-1])
            assert names, row
            for name in names:
                begin = name.removesuffix("…")
                names_found = (
                    [file.name for file in files] if name.endswith(".py") else sorted(there)
                )
                assert (
                    begin in names_found
                    if begin == name
                    else any(it.startswith(begin) for it in names_found)
                ), name
                checked += 1
    assert checked > 100


def test_every_reason_of_the_quarantine_is_explained() -> None:
    section = (DOCS / "faults.md").read_text("utf-8").partition("## Reasons in quarantine")[2]
    listed = {cells(line.text)[0].strip("`") for line in lines(section) if line.kind == "table"} - {
        "reason",
        "---",
    }
    assert listed == EXPLANATIONS.keys()


def test_every_trap_that_the_architecture_page_names_is_there() -> None:
    section = (DOCS / "architecture.md").read_text("utf-8").partition("## Traps")[2]
    named = [cells(line.text)[-1].strip("`") for line in lines(section) if line.kind == "table"][2:]
    assert len(named) >= 10
    assert [name for name in named if name not in TRAPS] == []


def test_the_changelog_begins_with_this_version() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["project"]
    versions = re.findall(r"^## (.*)$", (DOCS / "changelog.md").read_text("utf-8"), re.MULTILINE)
    assert versions[0] == project["version"]
    assert versions == sorted(
        versions, key=lambda version: [int(part) for part in version.split(".")], reverse=True
    )


@each_page
def test_a_page_is_as_wide_as_a_screen(page: Path) -> None:
    found = list(lines(page.read_text("utf-8")))
    assert [line for line in found if line.kind != "table" and len(line.text) > WIDTH] == []
    assert [
        cell
        for line in found
        if line.kind == "table"
        for cell in cells(line.text)
        if len(cell) > CELL
    ] == []


def test_sql_that_is_not_released_is_as_wide_as_a_screen() -> None:
    paths = [path for path in CHECKOUT.glob("sql/*/*.sql") if not path.name.startswith("0001_")]
    assert len(paths) > 15
    assert [
        f"{path.relative_to(CHECKOUT)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if len(line) > WIDTH
    ] == []


@each_page
def test_a_sentence_has_at_most_25_words(page: Path) -> None:
    sentences = [
        words for text in paragraphs(page.read_text("utf-8")) for words in words_of_sentences(text)
    ]
    assert [" ".join(words) for words in sentences if len(words) > SENTENCE_WORDS] == []


def test_the_language_is_plain() -> None:
    paths = [path for pattern in PLAIN_LANGUAGE for path in CHECKOUT.glob(pattern)]
    paths.remove(Path(__file__))  # it gives examples of forbidden words
    assert len(paths) >= len(PAGES)
    found = [
        f"{path.relative_to(CHECKOUT)}:{number}: {hit.group()!r}"
        for path in paths
        for number, text in texts(path)
        for hit in NOT_PLAIN.finditer(text)
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "'x' is no token",
        "up to so many rows",
        "built anew",
        "for ever",
        "Whoever may search",
        "the pass' rows",
    ],
)
def test_forbidden_words_are_found(text: str) -> None:
    assert NOT_PLAIN.search(text)


@pytest.mark.parametrize(
    "text", ["it is no longer kept", "there is no dataset", "the pass's rows", "the table 'outbox'"]
)
def test_plain_words_are_not_found(text: str) -> None:
    assert not NOT_PLAIN.search(text)


def test_strings_and_comments_of_code_can_be_checked(tmp_path: Path) -> None:
    python, sql = tmp_path / "a.py", tmp_path / "a.sql"
    python.write_text('"""A docstring."""\nX = f"a {1} message"  # a comment\n')
    sql.write_text("SELECT 1; -- a comment\n")
    assert {text for _, text in texts(python)} == {"A docstring.", "a ", " message", "# a comment"}
    assert [text for _, text in texts(sql)] == [" a comment"]


def test_the_picture_of_the_status_page_is_as_wide_as_a_screen_and_small() -> None:
    picture = (DOCS / "status-page.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(picture[16:20], "big") == 1200
    assert len(picture) < 100_000
