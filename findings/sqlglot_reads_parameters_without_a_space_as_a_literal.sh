#!/usr/bin/env bash
# One would guess: a parser for PostgreSQL's SQL reads f($1,$2) as it reads f($1, $2).
# What is so: without the space sqlglot takes "$1,$" for the beginning of a dollar-quoted literal and raises TokenError.
# PostgreSQL's own rule: a tag begins with a letter or an underscore.
# Version: sqlglot 30.30.0.
# Why it matters: drivers and query builders write parameters in either form. A program that looks at statements before they
# reach an index or a database has to take the parameters out first.
set -euo pipefail
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check sqlglot==30.30.0
"$T/venv/bin/python" - <<'PYTHON'
import sqlglot
from sqlglot.errors import TokenError

print("sqlglot", sqlglot.__version__)
outcomes = []
for text in ("SELECT f($1, $2)", "SELECT f($1,$2)"):
    try:
        outcomes.append(sqlglot.parse_one(text, dialect="postgres").sql(dialect="postgres"))
    except TokenError as error:
        outcomes.append(f"TokenError: {str(error).splitlines()[0]}")
    print(f"{text!r} -> {outcomes[-1]}")
raise SystemExit(not (outcomes[0] == "SELECT F($1, $2)" and outcomes[1].startswith("TokenError")))
PYTHON
