"""The documentation: its code runs, its recipes parse, its links lead somewhere, and it is current."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from sqcompile import Recipe
from sqcompile.cli.app import app
from sqcompile.pipeline import parse_pipeline

ROOT = Path(__file__).parents[1]
CHINESE = ROOT / "README.zh-CN.md"
PAGES = [ROOT / "README.md", CHINESE, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NO_TEST = "<!-- no-test -->"


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Yield (line, code) of the page's code blocks in a language, but those below NO_TEST."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S):
        if not text[: match.start()].rstrip().endswith(NO_TEST):
            yield text[: match.start(1)].count("\n") + 1, match[1]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(blocks(page, language))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, as a reader would type them; then its tests run."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code in blocks(page, "python"):
        # Lines are counted as in the page, so that a traceback points into it.
        lines = "\n" * (line - 1) + code
        exec(compile(lines, str(page), "exec", dont_inherit=True), module.__dict__)
    for name, function in list(vars(module).items()):
        if name.startswith("test_"):
            function()


@pytest.mark.parametrize("page", pages_with("yaml"), ids=name_of)
def test_recipes_parse(page: Path) -> None:
    for line, text in blocks(page, "yaml"):
        Recipe.parse(text, file=f"{name_of(page)}, block at {line}")


def commands(group: Any) -> Iterator[Any]:
    """The commands of the command line, those of groups such as `sqcompile recipe` included."""
    for command in group.commands.values():
        yield command
        if hasattr(command, "commands"):
            yield from commands(command)


def command_lines() -> list[str]:
    """The command lines of the pages, and of the help texts."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    texts += [command.help or "" for command in commands(get_command(app))]
    found = [line.strip() for text in texts for line in re.findall(r"^ +(sqcompile .*)$", text, flags=re.M)]
    return [line for line in dict.fromkeys(found) if "…" not in line]


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_are_valid(line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    if name in ("--install-completion", "--show-completion"):  # typer's own, of the program
        assert not arguments
        return
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    if hasattr(command, "commands"):  # a group takes any arguments, and parses none of them
        name, *arguments = arguments
        command = command.commands[name]
    context = command.make_context(name, list(arguments))  # an unknown option raises
    for text in context.params.get("passes") or ():
        if "replace-silu" not in text:  # the reader's own
            parse_pipeline(text)


def test_the_chinese_readme_says_the_same() -> None:
    """A translation gets old unseen: figures and commands have to be those of the other."""
    found = []
    for page in (ROOT / "README.md", CHINESE):
        text = page.read_text(encoding="utf-8")
        # Figures with a unit, as they stand in tables.
        figures = [
            re.findall(r"[\d.]+ ?(?:x|%|MB|kB)", line) for line in text.splitlines() if line.startswith("|")
        ]
        commands = [
            line.partition("  #")[0].strip() for line in re.findall(r"^    (\S.*)$", text, flags=re.M)
        ]
        code = [
            [line.partition("  #")[0] for line in code.splitlines()] for _, code in blocks(page, "python")
        ]
        found.append(([item for line in figures for item in line], commands, code))
    assert found[0] == found[1]
    assert len(found[0][0]) > 30 and len(found[0][1]) > 10 and found[0][2]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.zh-CN.md")), ids=name_of)
def test_translations_have_the_figures_and_commands_of_the_original(page: Path) -> None:
    found = []
    for text in (page.read_text(encoding="utf-8"), Path(str(page).replace(".zh-CN", "")).read_text("utf-8")):
        figures = [
            re.findall(r"[\d.]+ ?(?:x|%|MB|kB|dB|µs)", line)
            for line in text.splitlines()
            if "│" in line or "| " in line
        ]
        commands = re.findall(r"^    ((?:sqcompile|python|pip|cd) .*)$", text, flags=re.M)
        found.append(([item for line in figures for item in line], commands))
    assert found[0] == found[1]
    assert len(found[0][0]) > 10 and len(found[0][1]) > 5


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|^    .*?$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name_of(page)} links to {target}"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current() -> None:
    assert tool("make_docs").stale_pages() == [], "run: python tools/make_docs.py"


def test_figures_are_those_of_the_benchmarks() -> None:
    assert tool("make_figures").stale_figures() == [], "run: python tools/make_figures.py"


def test_the_layout_in_the_architecture_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    layout = text.partition("## The parts")[2].partition("The three folders")[0]
    folder = ROOT
    for line in layout.splitlines():
        name = line.split()[0] if line.strip() else ""
        if not name.endswith(("/", ".py")):
            continue
        if line.startswith("    ") and not line.startswith("      "):
            folder = ROOT / name
            assert folder.is_dir(), name
        else:
            assert (folder / name).exists(), f"{folder.name}/{name}"


def test_every_page_is_linked_from_another() -> None:
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            linked.add((page.parent / target).resolve())
    folders = {path for path in linked if path.is_dir()}  # a link to a folder shows what is in it
    orphans = [name_of(page) for page in PAGES[1:] if page not in linked and page.parent not in folders]
    assert orphans == []
