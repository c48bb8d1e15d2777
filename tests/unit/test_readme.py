"""What the README says that the code knows better."""

from __future__ import annotations

import re

from tests.oracle.prove_traps import TRAPS, misplaced, missing_tests
from tests.readme import README, settings_table, with_current_table


def test_the_readme_lists_every_setting_as_it_is() -> None:
    text = README.read_text("utf-8")
    assert text == with_current_table(text), "run: python -m tests.readme"


def test_the_table_tells_a_default_where_it_is_one_value() -> None:
    rows = {row.split("`")[1]: row for row in settings_table().splitlines()[2:]}
    assert rows["SYNCD_CHECKPOINT_SECONDS"].startswith("| `SYNCD_CHECKPOINT_SECONDS` | `60` |")
    assert rows["SYNCD_VERIFY_SECONDS"].startswith("| `SYNCD_VERIFY_SECONDS` | `86400` |")
    assert rows["SYNCD_TOKEN"].startswith("| `SYNCD_TOKEN` |  |")
    assert rows["SYNCD_DATA_DIR"].startswith("| `SYNCD_DATA_DIR` |  |")


def test_every_file_and_every_trap_that_the_architecture_page_names_is_there() -> None:
    text = (README.parent / "syncd" / "ARCHITECTURE.md").read_text("utf-8")
    named = {name for name in re.findall(r"`([^`\s]+)`", text) if re.match(r"(syncd|sql|tests|migrations|\.ci)/", name)}
    assert len(named) > 30
    assert [name for name in sorted(named) if not (README.parent / name).exists()] == []
    broken = [
        cells[-2].strip(" `") for line in text.splitlines() if len(cells := line.split("|")) == 5 and "`" in cells[-2]
    ]
    assert len(broken) >= 10
    assert [name for name in broken if name not in TRAPS] == []


def test_every_trap_finds_its_text_once_and_its_tests() -> None:
    assert {name: faults for name, trap in TRAPS.items() if (faults := misplaced(trap))} == {}
    assert missing_tests() == []


def test_every_test_that_the_tables_name_is_there() -> None:
    named = [(row, *test) for row in rows_with_tests(README.read_text("utf-8")) for test in named_in(row)]
    assert len(named) > 100
    assert [
        f"{pattern} in {file or 'tests'}: {row[:60]}" for row, file, pattern in named if not found(file, pattern)
    ] == []


def rows_with_tests(text: str) -> list[str]:
    """The rows of the tables whose last column names tests."""
    rows = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        heading, _, *lines = table.splitlines()
        if heading.split("|")[-2].strip().startswith("test"):
            rows += lines
    return rows


def named_in(row: str) -> list[tuple[str, str]]:
    """File and name of each test of a row; a name before which the row names no file may be in any."""
    file, tests = "", []
    for quoted in re.findall(r"`([^`]+)`", row.split("|")[-2]):
        if quoted.endswith(".py"):
            file = quoted
            tests.append((file, "…"))
        elif " " not in quoted:  # else it is a command
            tests.append((file, quoted))
    return tests


def found(file: str, pattern: str) -> bool:
    """Whether a test has this name, which is written without ``test_`` and with ``…`` for any part of it."""
    name = re.compile("def test_" + ".*".join(map(re.escape, pattern.split("…"))) + r"\(")
    root = README.parent / "tests"
    paths = [
        path for path in root.rglob("test_*.py") if path.name == file or str(path.relative_to(root.parent)) == file
    ]
    return any(name.search(path.read_text("utf-8")) for path in (paths if file else root.rglob("test_*.py")))


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text("utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).is_file()] == []


def test_the_picture_of_the_status_page_is_as_wide_as_a_screen_and_small() -> None:
    (link,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README.read_text("utf-8"))
    picture = (README.parent / link).read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(picture[16:20], "big") == 1200
    assert len(picture) < 100_000
