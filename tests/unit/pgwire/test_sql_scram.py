"""The server's side of SCRAM-SHA-256."""

from __future__ import annotations

import base64

import pytest

from syncd.pgwire.scram import Exchange, ScramError, Verifier, prepared

NONCE = "rOprNGfwEbeRWgbNEkqO"
SERVER_NONCE = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
FIRST = f"n,,n=user,r={NONCE}".encode()
FINAL = f"c=biws,r={NONCE}{SERVER_NONCE},p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=".encode()


def exchange(word: str = "pencil") -> Exchange:
    return Exchange(Verifier.of(word, salt=SALT, iterations=4096), SERVER_NONCE)


def test_the_example_of_rfc_7677_logs_in() -> None:
    login = exchange()
    assert (
        login.first(FIRST) == f"r={NONCE}{SERVER_NONCE},s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096".encode()
    )
    assert login.final(FINAL) == b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


def test_an_empty_user_name_logs_in() -> None:
    assert exchange().first(f"n,,n=,r={NONCE}".encode()).startswith(b"r=")


def test_another_password_is_refused() -> None:
    login = exchange("pen")
    login.first(FIRST)
    with pytest.raises(ScramError, match="password is wrong"):
        login.final(FINAL)


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"n",
        b"n,,",
        b"p=tls-unique,,n=,r=a",
        b"n,a=x,n=,r=a",
        b"n,,m=x,n=,r=a",
        b"n,,\xff",
        b"n,,n=,x",
    ],
)
def test_a_malformed_first_message_is_refused(first: bytes) -> None:
    with pytest.raises(ScramError):
        exchange().first(first)


@pytest.mark.parametrize(
    "final",
    [
        b"",
        b"c=biws",
        FINAL.replace(b"biws", b"eSws"),
        FINAL.replace(b"r=r", b"r=s"),
        FINAL.replace(b"p=d", b"p=e"),
        FINAL[:-4],
        b"c=!,r=x,p=!",
        b"\xff,p=AAAA",
    ],
)
def test_a_malformed_final_message_is_refused(final: bytes) -> None:
    login = exchange()
    login.first(FIRST)
    with pytest.raises(ScramError):
        login.final(final)


@pytest.mark.parametrize(
    ("password", "text"),
    [
        ("I\u00adX", "IX"),  # the examples of RFC 4013
        ("user", "user"),
        ("\u00aa", "a"),
        ("\u2168", "IX"),
        ("\u0007", "\u0007"),  # prohibited: unchanged, as in libpq
        ("\u0627\u0031", "\u0627\u0031"),
        ("a\u00a0b", "a b"),
    ],
)
def test_a_password_is_prepared_as_in_libpq(password: str, text: str) -> None:
    assert prepared(password) == text.encode()
