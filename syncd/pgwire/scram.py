"""The server's side of SCRAM-SHA-256, for one password and any user name (RFC 5802, RFC 7677).

A module of our own because scramp 1.5.0 refuses the empty user name that libpq sends. PostgreSQL
takes the name from the startup message instead. Channel binding is not offered.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import stringprep
import unicodedata
from dataclasses import dataclass

MECHANISM = "SCRAM-SHA-256"
ITERATIONS = 4096
"""Rounds of the password's hash: PostgreSQL's default."""
SALT_BYTES = 16
NONCE_BYTES = 18
_PROHIBITED = (
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
    stringprep.in_table_a1,
)


class ScramError(Exception):
    """A client's message is malformed, or the password is wrong."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """What a server keeps of a password."""

    salt: bytes
    iterations: int
    stored_key: bytes
    server_key: bytes

    @classmethod
    def of(
        cls, password: str, *, salt: bytes | None = None, iterations: int = ITERATIONS
    ) -> Verifier:
        """The verifier of a password, with a random salt unless one is given."""
        salt = salt or os.urandom(SALT_BYTES)
        salted = hashlib.pbkdf2_hmac("sha256", prepared(password), salt, iterations)
        client_key = _hmac(salted, b"Client Key")
        return cls(
            salt, iterations, hashlib.sha256(client_key).digest(), _hmac(salted, b"Server Key")
        )


class Exchange:
    """One client's login: ``first`` and then ``final``. Both raise ``ScramError``."""

    def __init__(self, verifier: Verifier, nonce: str | None = None) -> None:
        self._verifier = verifier
        self._nonce = nonce or base64.b64encode(os.urandom(NONCE_BYTES)).decode()
        self._gs2 = self._first_bare = self._first_answer = b""

    def first(self, message: bytes) -> bytes:
        """The answer to the client's first message."""
        flag, _, rest = message.partition(b",")
        authorization, _, bare = rest.partition(b",")
        if flag not in (b"n", b"y"):
            raise ScramError("channel binding is not supported")
        parts = _attributes(bare)
        if authorization or "m" in parts or "r" not in parts or "n" not in parts:
            raise ScramError("malformed SCRAM message")
        self._gs2 = message[: len(message) - len(bare)]
        self._first_bare = bare
        self._nonce = parts["r"] + self._nonce
        salt = base64.b64encode(self._verifier.salt).decode()
        answer = f"r={self._nonce},s={salt},i={self._verifier.iterations}"
        self._first_answer = answer.encode()
        return self._first_answer

    def final(self, message: bytes) -> bytes:
        """The answer to the client's final message, if its password is the right one."""
        without_proof, _, proof_text = message.rpartition(b",p=")
        parts = _attributes(without_proof)
        try:
            proof = base64.b64decode(proof_text, validate=True)
            binding = base64.b64decode(parts.get("c", ""), validate=True)
        except (binascii.Error, ValueError):
            raise ScramError("malformed SCRAM message") from None
        if binding != self._gs2 or not hmac.compare_digest(
            parts.get("r", "").encode(), self._nonce.encode()
        ):
            raise ScramError("malformed SCRAM message")
        signed = b",".join((self._first_bare, self._first_answer, without_proof))
        signature = _hmac(self._verifier.stored_key, signed)
        if len(proof) != len(signature):
            raise ScramError("malformed SCRAM message")
        client_key = bytes(a ^ b for a, b in zip(proof, signature, strict=True))
        if not hmac.compare_digest(hashlib.sha256(client_key).digest(), self._verifier.stored_key):
            raise ScramError("the password is wrong")
        return b"v=" + base64.b64encode(_hmac(self._verifier.server_key, signed))


def prepared(password: str) -> bytes:
    """The password after SASLprep (RFC 4013); unchanged if SASLprep refuses it, as in libpq."""
    mapped = "".join(
        " " if stringprep.in_table_c12(each) else each
        for each in password
        if not stringprep.in_table_b1(each)
    )
    text = unicodedata.normalize("NFKC", mapped)
    right_to_left = [stringprep.in_table_d1(each) for each in text]
    mixed = any(right_to_left) and not (
        right_to_left[0]
        and right_to_left[-1]
        and not any(stringprep.in_table_d2(each) for each in text)
    )
    if not text or mixed or any(table(each) for each in text for table in _PROHIBITED):
        return password.encode()
    return text.encode()


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _attributes(message: bytes) -> dict[str, str]:
    try:
        parts = [part.partition("=") for part in message.decode().split(",")]
    except UnicodeDecodeError:
        raise ScramError("malformed SCRAM message") from None
    if any(len(name) != 1 or not equals for name, equals, _ in parts):
        raise ScramError("malformed SCRAM message")
    return {name: value for name, _, value in parts}
