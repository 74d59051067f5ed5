"""Print every lower bound of pyproject.toml as an exact requirement: `pip install $(python .ci/lowest.py)`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def main() -> None:
    """Print them, one a line."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    needless = ("docs", "fuzz")  # which no test needs
    groups = [project["dependencies"], *(optional[name] for name in optional if name not in needless)]
    for requirement in [item for group in groups for item in group]:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement)
        if match:
            print(f"{match[1]}=={match[2]}")
        elif not requirement.startswith("prior-hub["):
            raise SystemExit(f"{requirement!r} has no lower bound of the form name>=version")


if __name__ == "__main__":
    main()
