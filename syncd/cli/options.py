"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Dsn = Annotated[
    str | None,
    typer.Option("--dsn", help="Connection string of the database.", show_default="SYNCD_DSN, PG*"),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data directory.", show_default="SYNCD_DATA_DIR")
]
Embedded = Annotated[
    bool,
    typer.Option(
        "--embedded", help="Run the PostgreSQL that is part of syncd, in the data directory."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Socket = Annotated[
    str | None,
    typer.Option("--socket", help="Socket of the running service.", show_default="SYNCD_SOCKET"),
]
