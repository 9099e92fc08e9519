"""Fill a page anew with what it names: python docs/console.py docs/scaling.md.

* Below each `$ lorapre ...` line goes what the command prints.
* A row of a table that begins with a `lorapre plan` command gets the memory of its last mesh.
* A block with the title of a source file gets the functions that it quotes, as they are there now.
"""

import ast
import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

from lorapre_recipes import cli

BLOCK = re.compile(r"^```console\n\$ (lorapre (?:[^\n]*\\\n)*[^\n]*\n).*?^```$", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `(lorapre plan [^`\n]*)` \|.*$", re.MULTILINE)
STATE = "optimizer state", "torch.optim.AdamW's state"  # columns of such a row, before the peak
QUOTE = re.compile(r"^```python title=\"(src/[^\"]+)\"\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROOT = Path(__file__).parents[1]


def rerun(page: str) -> str:
    """The page with every console block and row of memory made anew.

    Raises RuntimeError where a command fails.
    """
    page = BLOCK.sub(lambda block: f"```console\n$ {block[1]}{output(block[1])}```", page)
    return ROW.sub(lambda row: " | ".join((f"| `{row[1]}`", *memory(row[1]))) + " |", page)


def memory(command: str) -> list[str]:
    """The figures of the last column that a `lorapre plan` command prints."""
    rows = [re.split(" {2,}|: ", line) for line in output(command).splitlines()]
    last = {row[0]: row[-1] for row in rows}
    return [*(last[name] for name in STATE), last.get("peak") or last["peak, no activations"]]


def output(command: str) -> str:
    """What a command line prints."""
    printed = io.StringIO()
    argv = shlex.split(command.replace("\\\n", " "))
    with mock.patch("sys.argv", argv), contextlib.redirect_stdout(printed):
        code = cli.main()
    if code:
        raise RuntimeError(f"exit code {code}: {command}")
    return printed.getvalue()


def quoted(page: str) -> str:
    """The page with every quotation of the sources made anew."""

    def again(block: re.Match[str]) -> str:
        names = re.findall(r"^def (\w+)", block[2], re.MULTILINE)
        text = "\n\n\n".join(functions(block[1])[name] for name in names)
        return f'```python title="{block[1]}"\n{text}\n```'

    return QUOTE.sub(again, page)


def functions(source: str) -> dict[str, str]:
    """The text of every function of a source file, by name."""
    text = (ROOT / source).read_text(encoding="utf-8")
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(text, node) or "" for node in found}


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(quoted(rerun(path.read_text())))
