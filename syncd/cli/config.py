"""The command that shows the settings."""

from __future__ import annotations

from pydantic import SecretStr

from syncd.cli.options import Json
from syncd.cli.output import print_json, print_table, talk
from syncd.settings import CONFIG_FILES, Settings, config_file, load_settings


def config(json: Json = False) -> None:
    """Print every setting, its value now and what it does, and which syncd.toml is read. Secrets
    are not shown.

    Example: syncd config
    """
    settings = load_settings()
    rows = [
        (f"SYNCD_{name.upper()}", shown(getattr(settings, name)), field.description)
        for name, field in Settings.model_fields.items()
    ]
    if json:
        print_json({name: value for name, value, _ in rows})
    else:
        print_table(["variable", "value", ""], rows)
        file = config_file()
        names = " or ".join(map(str, CONFIG_FILES))
        talk(f"read: {file.absolute()}" if file else f"no configuration file is there: {names}")
        talk("A variable goes before its line there, such as: checkpoint_seconds = 30")


def shown(value: object) -> str | None:
    """A setting's value; a secret only says that it is set."""
    if isinstance(value, SecretStr):
        return "(set)" if value.get_secret_value() else None
    return None if value is None else str(value)
