"""The command that shows the settings."""

from __future__ import annotations

from pydantic import SecretStr

from syncd.cli.options import Json
from syncd.cli.output import print_json, print_table, talk
from syncd.settings import CONFIG_FILES, Settings, config_file, load_settings


def config(json: Json = False) -> None:
    """Print every setting with its value and meaning, and which syncd.toml is read. Secrets are not
    shown.

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
        talk(f"read: {file.absolute()}" if file else f"there is no configuration file: {names}")
        talk("A variable overrides its line in the file, such as: checkpoint_seconds = 30")


def shown(value: object) -> str | None:
    """Text of a setting's value; of a secret only whether it is set."""
    if isinstance(value, SecretStr):
        return "(set)" if value.get_secret_value() else None
    return None if value is None else str(value)
