"""Write the documentation that is made from the code: docs/command_line.md, errors.md and pass_catalog.md.

python tools/make_docs.py            writes them
python tools/make_docs.py --check    fails if they are not what the code says
"""

import inspect
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.main import get_command

from sqcompile import errors
from sqcompile.catalog import JOBS, YOURS, Entry, Option, catalog
from sqcompile.cli.app import app
from sqcompile.docstrings import Docstring

DOCS = Path(__file__).resolve().parent.parent / "docs"

MADE = "<!-- Made by tools/make_docs.py from the code; edits here are lost. -->\n"


def errors_page() -> str:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Error)
    ]
    lines = [
        MADE,
        "# Errors",
        "",
        "Every exception derives from `sqcompile.Error`. Its text has up to four parts:",
        "",
        "    RecipeError: There is no pass 'fold-bach-norm'.",
        "      where:    job.yaml, line 4",
        "      seen:     fold-bach-norm",
        "      expected: the name of a pass or of a pipeline",
        "      next:     did you mean 'fold-batch-norm'? `sqcompile passes` lists all",
        "",
        "The command line prints it on standard error, without a traceback (`--debug` shows it), and exits with",
        "the code of its kind: 1, the work failed; 2, the command line, a recipe or a pass's options are wrong.",
        "",
        "| error | exit code |",
        "|---|---|",
    ]
    lines += [f"| [`{kind.__name__}`](#{kind.__name__.lower()}) | {kind.exit_code} |" for kind in kinds]
    for kind in kinds:
        doc = Docstring.of(kind)
        base = kind.__bases__[0].__name__
        kind_of = f" A kind of `{base}`." if base not in ("Exception", "Error") else ""
        lines += ["", f"## {kind.__name__}", "", f"{doc.summary}{kind_of}"]
        if doc.body:
            lines += ["", doc.body]
        meanings = doc.entries("Args")
        if meanings:
            lines += ["", *(f"- `{name}`: {text}" for name, text in meanings.items())]
    return "\n".join(lines) + "\n"


def catalog_page() -> str:
    entries = [entry for entry in catalog() if entry.job != YOURS]
    lines = [
        MADE,
        "# Passes and pipelines",
        "",
        "Every pass and named pipeline, from its own documentation; `sqcompile passes NAME` shows the same.",
        "A pipeline's text names both, with options in braces:",
        "",
        "    fold-batch-norm,mask-weights{sparsity=0.5,pattern=1x4},apply-masks",
        "",
        "*Needs* and *leaves* are [levels](architecture.md#levels); *keeps* is the equality that a pass promises,",
        "and that the pass manager measures after it has run.",
    ]
    for job, title in JOBS.items():
        found = [entry for entry in entries if entry.job == job]
        if not found:
            continue
        lines += ["", f"## {title.partition(':')[0]}", "", f"{title.partition(': ')[2].capitalize()}.", ""]
        lines += ["| name | what it does |", "|---|---|"]
        lines += [f"| [`{entry.name}`](#{entry.name}) | {_cell(entry.doc.summary)} |" for entry in found]
        for entry in found:
            lines += _entry_lines(entry)
    return "\n".join(lines) + "\n"


def _entry_lines(entry: Entry) -> list[str]:
    lines = ["", f"### {entry.name}", "", entry.doc.summary]
    for paragraph in entry.doc.paragraphs():
        lines += ["", paragraph]
    about = entry.data()
    lines.append("")
    if "passes" in entry.facts:
        lines.append(f"- **Passes**: `{entry.facts['passes']}`")
    else:
        facts = entry.facts
        lines.append(
            f"- **Needs** `{facts['needs']}`, **leaves** `{facts['leaves']}`, **keeps** {facts['keeps']}"
        )
    for title, text in about["sections"].items():
        if title == "Keeps" and text.rstrip(".") == entry.facts.get("keeps", "").rstrip("."):
            continue
        one_line = " ".join(text.split())
        code = title in ("Rewrites", "Shapes")
        lines += [f"- **{title}**:", "", *_block(text), ""] if code else [f"- **{title}**: {one_line}"]
    while lines[-1] == "":
        lines.pop()
    if entry.options:
        lines += ["", "| option | type | default | meaning |", "|---|---|---|---|"]
        lines += [_option_line(option) for option in entry.options]
    return lines


def _block(text: str) -> list[str]:
    return [f"      {line}" for line in text.splitlines()]


def _option_line(option: Option) -> str:
    default = "needed" if option.default is None else f"`{option.default}`"
    return f"| `{option.name}` | {_cell(option.type)} | {_cell(default)} | {_cell(option.doc)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def command_line_page() -> str:
    commands: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]
    for group, command in list(commands.items()):
        for name, part in getattr(command, "commands", {}).items():
            commands[f"{group} {name}"] = part
    lines = [
        MADE,
        "# The command line",
        "",
        "What `sqcompile COMMAND --help` says, on one page.",
        "",
        "| command | what it does |",
        "|---|---|",
    ]
    lines += [
        f"| [`{name}`](#sqcompile-{name.replace(' ', '-')}) | {_cell(_first_line(command))} |"
        for name, command in commands.items()
    ]
    lines += ["", COMMON.strip()]
    for name, command in commands.items():
        lines += _command_lines(name, command)
    return "\n".join(lines) + "\n"


COMMON = """
## What all have in common

- **Answers** go to standard output, as text or, with `--json`, as JSON and nothing else: what is not finite is
  `null`. An error is `{"error": {"kind": …, "what": …, "where": …, "seen": …, "expected": …, "next_step": …}}` then.
  A wrong command line is one, too, of the kind `UsageError`. The rest goes to standard error: messages, and
  progress with the time left, where that is a terminal.
- **Errors** have [four parts](errors.md) and no traceback; `--debug` shows it.
- **Warnings** of libraries are not shown without `--debug`.

| exit code | meaning |
|---|---|
| 0 | it worked |
| 1 | the work failed, or the answer is no: a backend of `doctor` that does not run |
| 2 | the command line, a recipe or a pass's options are wrong; nothing was done |
| 130 | interrupted |

### Tab completion

    sqcompile --install-completion

for the shell that you use (bash, zsh, fish), from its next start on; `sqcompile --show-completion` prints what would be
installed.

### Environment

| variable | meaning |
|---|---|
| `SQCOMPILE_ISA` | instruction set of the native engine: `scalar`, `avx2`, …; one that is not there is an error |
| `SQCOMPILE_CACHE` | folder of runtimes that were built for other CPUs; else `~/.cache/sqcompile` |
| `OMP_NUM_THREADS` | threads within an operator, unless `--threads` says it |
| `COLUMNS` | width of what is printed into files and pipes; 200 |
"""


def _command_lines(name: str, command: Any) -> list[str]:
    lines = ["", f"## sqcompile {name}", "", _plain(command.help or "")]
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    options = [item for item in command.params if item.param_type_name == "option" and not item.hidden]
    if arguments:
        lines += ["", "| argument | meaning |", "|---|---|"]
        lines += [
            f"| `{item.metavar or item.name}` | {_cell(_plain(item.help or ''))} |" for item in arguments
        ]
    if options and not hasattr(command, "commands"):
        lines += ["", "| option | meaning |", "|---|---|"]
        lines += [
            _option_row(item, typing.get_type_hints(inspect.unwrap(command.callback))) for item in options
        ]
    return lines


def _option_row(option: Any, types: dict[str, Any]) -> str:
    value = "" if option.is_flag else f" {option.metavar or _value(types[option.name])}"
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return f"| {names}{value} | {_cell(_plain(option.help or ''))} |"


def _value(kind: Any) -> str:
    """Return what stands for a value of a type."""
    text = str(kind)
    return "N" if "int" in text else "X" if "float" in text else "TEXT"


def _plain(text: str) -> str:
    """Return a help text as Markdown: without what it says to the terminal's formatter."""
    return re.sub(r"\n?\x08\n", "\n", text).strip()


def _first_line(command: Any) -> str:
    return _plain(command.help or "").partition("\n\n")[0].replace("\n", " ")


PAGES: dict[str, Callable[[], str]] = {
    "command_line.md": command_line_page,
    "errors.md": errors_page,
    "pass_catalog.md": catalog_page,
}


def stale_pages() -> list[str]:
    """Names of the pages that are not what the code says."""
    return [
        name
        for name, page in PAGES.items()
        if not (DOCS / name).is_file() or (DOCS / name).read_text(encoding="utf-8") != page()
    ]


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        stale = stale_pages()
        for name in stale:
            print(f"docs/{name} is not what the code says: run python tools/make_docs.py")
        return 1 if stale else 0
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
