"""Check the links of every Markdown file of the repository: python docs/check_links.py [--external].

Relative links must lead to a file or folder of the repository, and their anchors to a heading, as GitHub makes them. Links
elsewhere are not followed, there may be no network: --external lists them. Links in code are none.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("*.md", "docs/**/*.md", "model_cards/**/*.md", "benchmarks/**/*.md", "fuzz/**/*.md")
_FENCE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2`*$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?:(?: {4}|\t).*\n?)+")
_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"!?\[[^\[\]]*(?:\[[^\]]*\][^\[\]]*)?\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_TAG = re.compile(r"<(?:img|a|source)\s[^>]*?(?:src|href|srcset)=\"([^\"]+)\"")
_AUTO = re.compile(r"<(https?://[^>\s]+)>")
_HEADING = re.compile(r"^#{1,6} +(.*?) *#*$", re.MULTILINE)


class Link(NamedTuple):
    """A link of a file."""

    file: Path
    target: str


def markdown_files(root: Path = ROOT) -> list[Path]:
    """The files that are checked."""
    return sorted({path for pattern in PLACES for path in root.glob(pattern) if path.is_file()})


def links_of(path: Path) -> list[Link]:
    """The links of a file, those in code left out."""
    text = path.read_text(encoding="utf-8")
    for code in (_COMMENT, _FENCE, _INDENTED):
        text = code.sub("", text)
    tidy = _CODE.sub(lambda found: "`" if "](" not in found[0] else "", text)
    return [Link(path, found[1]) for pattern in (_LINK, _TAG, _AUTO) for found in pattern.finditer(tidy)]


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a file."""
    text = _FENCE.sub("", _COMMENT.sub("", path.read_text(encoding="utf-8")))
    seen: Counter[str] = Counter()
    result = set()
    for heading in _HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        result.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return result


def is_external(target: str) -> bool:
    """Whether a link leaves the repository."""
    return re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE) is not None


def broken(files: list[Path], root: Path = ROOT) -> list[str]:
    """One line for each relative link that leads nowhere."""
    problems = []
    for link in (link for file in files for link in links_of(file) if not is_external(link.target)):
        name, _, anchor = link.target.partition("#")
        path = (link.file.parent / unquote(name)).resolve() if name else link.file
        where = f"{link.file.relative_to(root)}: ({link.target})"
        if not path.exists() or not path.is_relative_to(root):
            problems.append(f"{where} leads to no file of the repository")
        elif anchor and (path.suffix != ".md" or unquote(anchor) not in anchors_of(path)):
            problems.append(f"{where} leads to no heading of {path.relative_to(root)}")
    return problems


def main() -> int:
    """Print what is broken; exit code 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--external", action="store_true", help="also list the links that leave the repository")
    arguments = parser.parse_args()
    files = markdown_files()
    found = [link for file in files for link in links_of(file)]
    problems = broken(files)
    outside = sorted({link.target for link in found if is_external(link.target)})
    if arguments.external:
        print("\n".join(outside))
    print(
        "\n".join(
            [
                *problems,
                f"{len(files)} files, {len(found)} links, {len(problems)} broken; {len(outside)} addresses not followed",
            ]
        )
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
