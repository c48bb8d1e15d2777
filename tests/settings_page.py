"""The page of the settings, made from the settings: ``python -m tests.settings_page``."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from syncd.settings import Settings

PAGE = Path(__file__).parents[1] / "syncd" / "docs" / "settings.md"
BEGIN = "<!-- settings: written by python -m tests.settings_page -->\n"
END = "<!-- end of settings -->\n"


def settings_table() -> str:
    """Every setting: its variable, its default if that is one value, and its description."""
    rows = [
        f"| `SYNCD_{name.upper()}` | {shown_default(field)} | {as_text(str(field.description))} |\n"
        for name, field in Settings.model_fields.items()
    ]
    return "| variable | default | meaning |\n|---|---|---|\n" + "".join(rows)


def shown_default(field: FieldInfo) -> str:
    """A default that is one value; the description has other defaults."""
    value = (
        field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    )
    if field.is_required() or field.default_factory is not None or value in (None, ""):
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def as_text(description: str) -> str:
    """A description in which Markdown sees neither a tag nor the end of a cell."""
    return description.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def with_current_table(text: str) -> str:
    """The page with the current table. ``ValueError`` if the markers are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} lacks {BEGIN.strip()} or {END.strip()}")
    return f"{before}{begin}{settings_table()}{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_current_table(PAGE.read_text("utf-8")), "utf-8")
