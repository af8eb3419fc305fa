"""URLs of databases and servers, as they may be shown and stored."""

from __future__ import annotations


def masked(url: str) -> str:
    """The URL without its password."""
    head, at, tail = url.rpartition("@")
    scheme, slashes, account = head.partition("://")
    return f"{scheme}{slashes}{account.split(':')[0]}{at}{tail}" if at else url
