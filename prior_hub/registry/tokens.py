"""Access tokens and signatures of addresses are kept out of what is printed.

A server may say them back ("invalid token hf_..."), the client puts the address it asked into its errors, and addresses of
contents are signed. All of it would stand in a traceback that somebody pastes into an issue.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from huggingface_hub import get_token

__all__ = ["TOKEN", "discreet", "remember", "scrubbed"]

TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}\b")  # of the Hub; its own have 34 characters after the prefix
_BEARER = re.compile(r"\b(bearer)\s+\S+", re.IGNORECASE)
_QUERY = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\")>]+")
_SHORTEST = 8  # characters; a shorter word is no token, and may be part of any text
_MOST_ERRORS = 30  # of a chain
_known: set[str] = set()


def remember(token: str | bool | None) -> None:
    """Have a token that was given taken out of errors from now on."""
    if isinstance(token, str) and len(token) >= _SHORTEST:
        _known.add(token)


def scrubbed(text: str) -> str:
    """The text without tokens (those given, the logged-in one, and what looks like one) and without queries of addresses."""
    for token in sorted({*_known, get_token() or ""}, key=len, reverse=True):
        if len(token) >= _SHORTEST:
            text = text.replace(token, "hf_***")
    text = _BEARER.sub(r"\1 ***", TOKEN.sub("hf_***", text))
    return _QUERY.sub(r"\1", text)


@contextlib.contextmanager
def discreet() -> Iterator[None]:
    """Errors leave the block with scrubbed texts, and so do those that caused them."""
    try:
        yield
    except Exception as error:
        _scrub(error)
        raise


def _scrub(error: BaseException) -> None:
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_ERRORS:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
        if any(isinstance(part, str) and scrubbed(part) != part for part in one.args):
            one.args = tuple(scrubbed(part) if isinstance(part, str) else part for part in one.args)
        for name in ("server_message", "strerror", "message"):
            value = getattr(one, name, None)
            if isinstance(value, str) and scrubbed(value) != value:
                with contextlib.suppress(AttributeError, TypeError):
                    setattr(one, name, scrubbed(value))
