"""Vectors, filters and keys in the options of a command, and keys in its tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from syncd.client.client import Client
from syncd.errors import SettingsError


def read_vector(text: str) -> list[float]:
    """The vector of an option, which may name a file or stdin; raises ``SettingsError``."""
    if text == "-":
        text = sys.stdin.read()
    elif text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except OSError as error:
            raise SettingsError(
                f"{text[1:]} cannot be read: {error.strerror}",
                hint="give --vector @FILE with a JSON array",
            ) from error
    value = read_json(text, "--vector")
    if not isinstance(value, list) or not all(type(element) in (int, float) for element in value):
        raise SettingsError(
            "--vector is not an array of numbers", hint="for example --vector '[0.1, 0.2, 0.3]'"
        )
    return value


def read_filter(text: str) -> dict[str, Any]:
    """The filter of an option; raises ``SettingsError``."""
    value = read_json(text, "--filter")
    if not isinstance(value, dict):
        raise SettingsError(
            "--filter is not a JSON object", hint='for example --filter \'{"lang": "en"}\''
        )
    return value


def read_json(text: str, option: str) -> Any:
    """The JSON value of an option; raises ``SettingsError``."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{option} is not JSON: {error}", hint="quote it for the shell: '…'"
        ) from error


def key_argument(client: Client, dataset: str, text: str) -> Any:
    """The key of an option, with the type that the dataset's keys have.

    A number for integers, an array for a composite key, else the same text.
    """
    page = client.keys_page(dataset, limit=1)
    kind = type(page.keys[0]) if page.keys else str
    if kind is tuple:
        value = read_json(text, "--key")
        if not isinstance(value, list):
            raise SettingsError(
                f"{text!r} is not a key of {dataset}: its keys are composite",
                hint="for example --key '[1, \"a\"]'",
            )
        return value
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise SettingsError(
                f"{text!r} is not a key of {dataset}: its keys are numbers",
                hint="give a number, such as --key 42",
            ) from None
    return text


def shown_key(key: object) -> str:
    """Text of a key, for a table."""
    return msgspec.json.encode(key).decode() if isinstance(key, list) else str(key)
