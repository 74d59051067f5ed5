"""A hook of mkdocs: links that leave docs/ for another file of the repository.

On GitHub and in an editor `[the grid](../benchmarks/transfer/README.md)` leads to the file. The site holds docs/ only: there
the link goes to the file in `repo_url` (mkdocs.yml), and while there is no public repository the text names the file instead.
tests/test_docs.py checks that every such file exists.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The page with links out of docs/ turned into what the site can show."""
    here = posixpath.dirname("docs/" + page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], posixpath.normpath(posixpath.join(here, found[2])), found[3] or ""
        if target.startswith("docs/"):
            return found[0]
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{target}{anchor})"
        name = f"`{target}`"
        return name if text.strip("`") == target else f"{text} ({name})"

    pieces = _FENCE.split(markdown)
    return "".join(piece if i % 2 else _LINK.sub(link, piece) for i, piece in enumerate(pieces))
