"""PostgreSQL's names of encodings, as Python's codecs."""

from __future__ import annotations

import codecs
import re

UTF8 = "utf-8"
_NOT_IN_A_NAME = re.compile(r"[^a-z0-9]")
_CODECS = {
    "utf8": UTF8,
    "unicode": UTF8,
    "sqlascii": UTF8,
    "koi8": "koi8-r",
    "koi8r": "koi8-r",
    "koi8u": "koi8-u",
    "alt": "cp866",
    "win": "cp1251",
    "uhc": "cp949",
    "euccn": "gb2312",
    "sjis": "cp932",
    "shiftjis": "cp932",
    "shiftjis2004": "shift_jis_2004",
    "eucjis2004": "euc_jis_2004",
    **{name: name for name in ("big5", "gbk", "gb18030", "johab")},
    **{f"latin{number}": f"latin{number}" for number in range(1, 11)},
    **{f"iso8859{number}": f"iso8859-{number}" for number in range(1, 17) if number != 12},
    **{f"win{page}": f"cp{page}" for page in (866, 874, *range(1250, 1259))},
    **{f"euc{country}": f"euc_{country}" for country in ("jp", "kr")},
}


def codec_of(name: str) -> str | None:
    """Python's codec for a client encoding; None if there is none."""
    codec = _CODECS.get(_NOT_IN_A_NAME.sub("", name.lower()))
    return None if codec is None else codecs.lookup(codec).name
