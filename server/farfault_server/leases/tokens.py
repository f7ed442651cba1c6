"""Tokens: made here, shown once, kept as a hash only."""

from __future__ import annotations

import hashlib
import hmac
import secrets

TOKEN_BYTES = 32


def new_token() -> str:
    """256 random bits, URL-safe."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def new_lease_id() -> str:
    return secrets.token_hex(8)


def new_generation() -> int:
    """A number that no other run of this VM has; 63 bits, never 0 (0 means "any" in Open)."""
    return secrets.randbits(62) + 1


def token_hash(token: str) -> str:
    """What the record keeps. A plain hash is enough: the token has 256 random bits."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def matches(token: str, expected_hash: str) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(token_hash(token), expected_hash)
