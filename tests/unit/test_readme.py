"""What the README says that the code knows better."""

from __future__ import annotations

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
