"""What mkdocs cannot do by itself: files of the repository on the site, formulae, a look at what it made.

Pages link to files outside docs/ as they do in the repository: `../LOG.md`, `../src/lorapre/variants.py`.
What is linked to comes onto the site too, Markdown as a page, sources and notebooks as pages that show them.
"""

import dataclasses
import html
import io
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from latex2mathml.converter import convert
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))  # the commands as they are here
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
CODE_LINK = re.compile(r"\[`([\w.]+)`\]\((?:\.\./)?src/lorapre/([\w/]+)\.py\)")
FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)
GENERATED = re.compile(r"^<!-- (help|presets) of lorapre (\w+) -->$", re.MULTILINE)
FENCED = re.compile(r"^(`{3,})[^`\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
SHOWN = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml", ".txt": "text", "": "make"}

log = get_plugin_logger("hooks")


# Files of the repository


def on_files(files: Files, config: Any) -> Files:
    """Add what pages and the navigation name and docs/ does not have."""
    todo = [*_navigation(config["nav"]), *(name for file in files for name in _links(file))]
    while todo:
        file = _file(todo.pop(), config, files)
        if file is not None:
            files.append(file)
            todo += _links(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = _repository_path(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[1]))
        return posixpath.relpath(_site_path(target), posixpath.dirname(page.file.src_uri) or ".")

    def documented(link: re.Match[str]) -> str:
        module = link[2].replace("/", ".")
        name = link[1] if link[1].startswith(f"{module}.") else f"{module}.{link[1]}"
        return f"[`{link[1]}`][lorapre.{name}]"

    markdown = GENERATED.sub(lambda place: _OF_COMMANDS[place[1]](place[2]), markdown)
    kept = [block[0] for block in FENCED.finditer(markdown)]
    prose = LINK.sub(moved, CODE_LINK.sub(documented, FENCED.sub("\0", markdown)))
    return re.sub("\0", lambda _: kept.pop(0), prose)


def on_page_content(content: str, /, **_: Any) -> str:
    """Turn formulae into MathML, which browsers render without a script."""

    def rendered(formula: re.Match[str]) -> str:
        tag, tex = formula[1], html.unescape(formula[2])
        mathml = convert(tex, display="block" if tag == "div" else "inline")
        return f'<{tag} class="formula" title="{html.escape(tex)}">{mathml}</{tag}>'

    return FORMULA.sub(rendered, content)


def _navigation(entries: Any) -> Iterator[str]:
    """Files of the repository in the navigation."""
    if isinstance(entries, str):
        yield _repository_path(entries)
    else:
        for entry in entries.values() if isinstance(entries, dict) else entries:
            yield from _navigation(entry)


def _links(file: File) -> Iterator[str]:
    """Files of the repository that a page links to."""
    if file.src_uri.endswith(".md"):
        here = posixpath.dirname(_repository_path(file.src_uri))
        prose = FENCED.sub("", file.content_string)
        yield from (posixpath.normpath(posixpath.join(here, link)) for link in LINK.findall(prose))


def _repository_path(page: str) -> str:
    """Path in the repository of a file of the site."""
    if page.endswith((".py.md", ".ipynb.md", ".txt.md", ".toml.md", ".yaml.md", "Makefile.md")):
        return page.removesuffix(".md")
    inside = f"docs/{page}"
    return inside if (ROOT / inside).exists() or not (ROOT / page).exists() else page


def _site_path(path: str) -> str:
    """Path on the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    source = Path(path).suffix in SHOWN or path.endswith(".ipynb")
    return f"{path}.md" if source and (ROOT / path).is_file() else path


def _file(path: str, config: Any, files: Files) -> File | None:
    """A file of the repository as one of the site; None if it is there already, or does not exist."""
    name = _site_path(path)
    if path.startswith("docs/") or files.get_file_from_path(name) or not (ROOT / path).is_file():
        return None
    if path.endswith(".ipynb"):
        return File.generated(config, name, content=_notebook(ROOT / path))
    if name != path:
        text = (ROOT / path).read_text(encoding="utf-8")
        return File.generated(
            config, name, content=f"# {path}\n\n````{SHOWN[Path(path).suffix]}\n{text}````\n"
        )
    return File.generated(config, name, abs_src_path=str(ROOT / path))


def _notebook(path: Path) -> str:
    """A notebook as Markdown, its pictures inside."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                png = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="Picture made by the cell above" src="data:image/png;base64,{png}">')
            elif printed := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


# Options and presets of the commands


def _help(command: str) -> str:
    """What `lorapre COMMAND --help` prints."""
    from lorapre_recipes.cli import app

    printed = io.StringIO()
    app([command, "--help"], console=Console(file=printed, width=80), result_action="return_value")
    text = re.sub(r" +$", "", printed.getvalue(), flags=re.MULTILINE).strip()
    return f"```text\n{text}\n```"


def _presets(command: str) -> str:
    """The options of every preset: those that differ as one table, those that all share as another."""
    from lorapre_recipes import presets

    makers: Any = {"pretrain": presets.PRETRAIN, "finetune": presets.FINETUNE}[command]
    configs = [dataclasses.asdict(make("lorapre-adamw")) for make in makers.values()]
    known = set(re.findall(r"--([\w-]+)", _help(command))) - {"preset"}
    differing, shared = [["option", *makers]], [["option", "all presets"]]
    for name in configs[0]:
        cells = [_shown(config[name]) for config in configs]
        if name.replace("_", "-") in known and any(cells):
            flag = f"`--{name.replace('_', '-')}`{{.option}}"
            (differing if len({*cells}) > 1 else shared).append([flag, *cells])
    return f"{_table(differing)}\n\n{_table([row[:2] for row in shared])}"


def _shown(value: Any) -> str:
    """The value of an option as it is typed; nothing where it is off."""
    if value is None or value is False:
        return ""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "on" if value is True else str(value)


def _table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_OF_COMMANDS = {"help": _help, "presets": _presets}


# The finished pages


class _Page(HTMLParser):
    """Anchors of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors, self.links, self.loaded = {""}, set[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loaded.add(given["src"])
        if tag == "link" and "href" in given and given.get("rel") != "canonical":
            self.loaded.add(given["href"])
        if tag == "a" and "href" in given:
            self.links.add(given["href"])


def on_post_build(config: Any) -> None:
    """Warn, which `--strict` makes an error, where a link leads nowhere or something comes from elsewhere."""
    site = Path(config["site_dir"])
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        where = path.relative_to(site)
        for link in page.loaded:
            if re.match(r"(https?:)?//", link):
                log.warning("%s loads %s", where, link)
        for link in page.links | page.loaded:
            if re.match(r"[\w+]+:|//", link):
                continue
            name, _, anchor = link.partition("#")
            base = site if name.startswith("/") else path.parent
            target = (base / unquote(name.lstrip("/"))).resolve() if name else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                log.warning("%s: %s leads nowhere", where, link)
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                log.warning("%s: %s has no such place", where, link)
