"""Write the parts of the documentation that are told by the code: python docs/make.py [--check].

- docs/cli.md: every command of `prior-hub` with its options and examples, from the parser.
- docs/api.md and docs/api/*.md: every public name once, by the room it is of, from `prior_hub.__all__`; mkdocstrings fills the
  pages from the docstrings.
- README.md: the table of commands, and that of the priors of model_cards/, between their comments.

It needs no torch. With --check nothing is written: exit code 1 and the names of the files that are not what this writes.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the package of this folder, installed or not

import prior_hub  # noqa: E402
from prior_hub.cli import _parser  # noqa: E402

ROOMS = {
    "priors": "Priors and the Hub",
    "learning": "Learning a prior",
    "finetuning": "Fine-tuning under a prior",
    "inference": "Sampling the posterior",
}
GENERATED = "<!-- written by docs/make.py -->\n"


# ------------------------------------------------------------------------------------------------------- command line


def commands() -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Command -> (what it does in a line, its parser), in the order of `prior-hub --help`."""
    (sub,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help or "" for choice in sub._choices_actions}
    return {name: (summaries[name], parser) for name, parser in sub.choices.items() if name in summaries}


def cli_page() -> str:
    """docs/cli.md."""
    parts = [
        "# The command line",
        GENERATED,
        "Every command prints its own help with `--help`. With `--json` it prints one JSON object, errors too. Exit codes: 0 "
        "done; 1 the prior, the Hub or the disk said no, and the message says what and what to do; 2 the command was not "
        "understood; 130 interrupted. A prior is named as everywhere on the Hub, `organisation/name`, or is a folder. The "
        "[transcript](transcript.md) shows what each command prints.\n",
        "| command | what it does |\n|---|---|",
    ]
    parts += [f"| [`{name}`](#{name}) | {_cell(summary)} |" for name, (summary, _) in commands().items()]
    for name, (_, parser) in commands().items():
        parts += [f"\n## {name}\n", _sentences(parser.description or ""), "", *_options(name, parser)]
        examples = (parser.epilog or "").partition("examples:\n")[2]
        parts += ["", "```sh", "\n".join(line.strip() for line in examples.splitlines() if line.strip()), "```"]
    return "\n".join(parts) + "\n"


def _options(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    actions = [
        action for action in parser._actions if action.help != argparse.SUPPRESS and "--help" not in action.option_strings
    ]
    places = [action for action in actions if not action.option_strings]
    words = [f"[{action.dest}]" if action.nargs == "?" else str(action.metavar or action.dest) for action in places]
    needed = [f"{a.option_strings[-1]} {a.metavar}" for a in actions if a.option_strings and a.required]
    yield f"    prior-hub {' '.join([name, *words, *needed])} [options]\n"
    yield "| argument | |\n|---|---|"
    for action in actions:
        label = action.dest if not action.option_strings else ", ".join(action.option_strings)
        if action.choices is not None:
            label += " {" + ",".join(map(str, action.choices)) + "}"
        elif action.option_strings and action.nargs != 0 and action.metavar:
            label += f" {action.metavar}" + (" ..." if action.nargs == "+" else "")
        text = (action.help or "") % (vars(action) | {"prog": parser.prog})
        yield f"| `{label}` | {_cell(text)} |"


def _sentences(text: str) -> str:
    return text.replace("*", r"\*").replace("_", r"\_")


def _cell(text: str) -> str:
    return " ".join(_sentences(text).replace("|", r"\|").replace("<", "&lt;").split())


# ---------------------------------------------------------------------------------------------------------------- API


def places() -> dict[str, str]:
    """Public name -> the module it is defined in."""
    result = {}
    for name in prior_hub.__all__:
        module = prior_hub._LAZY.get(name) or getattr(prior_hub.__dict__[name], "__module__", None) or "prior_hub"
        result[name] = str(module)
    return result


def room_of(module: str) -> str:
    """The page a module's names are on."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "priors"


def api_pages() -> dict[str, str]:
    """docs/api.md, and the page of each room."""
    named = places()
    overview = [
        "# API reference",
        GENERATED,
        "Every public name, imported from `prior_hub`; importing the package loads neither torch nor transformers until a name "
        "is used. Penalties are in nats, sizes in bytes, times in seconds. Errors are kinds of `PriorHubError`.\n",
    ]
    pages = {}
    for room, title in ROOMS.items():
        names = sorted(
            (n for n, module in named.items() if room_of(module) == room), key=lambda n: (n.startswith("_"), n.lower())
        )
        overview += [f"\n## {title}\n", "| name | |\n|---|---|"]
        overview += [f"| [`{name}`](api/{room}.md) | {_cell(summary(name, named[name]))} |" for name in names]
        directives = "\n\n".join(f"::: {named[name]}.{name}" for name in names)
        pages[f"docs/api/{room}.md"] = f"# {title}\n{GENERATED}\n{directives}\n"
    return {"docs/api.md": "\n".join(overview) + "\n", **pages}


def summary(name: str, module: str) -> str:
    """The first line of a name's docstring, read from the source: importing it would load torch."""
    if name == "__version__":
        return "The version of the package."
    path = ROOT / (module.replace(".", "/") + ".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0].replace("`", "")
    return ""


# ------------------------------------------------------------------------------------------------------------- README


def command_table() -> str:
    """The README's table of commands."""
    rows = [f"| [`{name}`](docs/cli.md#{name}) | {_cell(text)} |" for name, (text, _) in commands().items()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def prior_table() -> str:
    """The README's table of priors: what model_cards/ says, and which of them exist."""
    rows = ["| card | source task | values | rank | state |", "|---|---|---|---|---|"]
    for path in sorted((ROOT / "model_cards").glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        made = bool(config["weight_files"])
        source = f"{config['source'].get('objective', '')}, {config['source'].get('dataset', '')}"
        state = "made with this library, not uploaded yet" if made else "a recipe: not converted here, not uploaded"
        name = path.stem
        rows.append(
            f"| [{name}](model_cards/{name}.md) | {_cell(source)} | {config['num_parameters']:,} | {config['rank']} | {state} |"
        )
    return "\n".join(rows)


def with_block(text: str, name: str, block: str) -> str:
    """A text with the block between its two comments replaced."""
    pattern = re.compile(rf"(<!-- {name}: written by docs/make.py -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no '<!-- {name}: written by docs/make.py -->' with its end.")
    return pattern.sub(lambda found: f"{found[1]}{block}\n{found[2]}", text)


def files() -> dict[str, str]:
    """File name -> what it should hold."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = with_block(with_block(readme, "commands", command_table()), "priors", prior_table())
    return {"docs/cli.md": cli_page(), **api_pages(), "README.md": readme}


def main() -> int:
    """Write the files, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something is not up to date")
    check = parser.parse_args().check
    stale = []
    for name, text in files().items():
        path = ROOT / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if stale:
        print(("not what docs/make.py writes: " if check else "written: ") + ", ".join(stale))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
