"""URLs of databases, in the form of other programs."""

from __future__ import annotations

from psycopg.conninfo import conninfo_to_dict


def sqlalchemy_url(conninfo: str) -> str:
    """The URL of a database behind a Unix socket, for SQLAlchemy with psycopg."""
    parts = conninfo_to_dict(conninfo)
    place = f"host={parts['host']}&port={parts['port']}"
    return f"postgresql+psycopg://{parts['user']}@/{parts['dbname']}?{place}"
