"""Put below each `$ lorapre ...` line of a page what it prints: python docs/console.py docs/scaling.md."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

from lorapre_recipes import cli

BLOCK = re.compile(r"^```console\n\$ (lorapre (?:[^\n]*\\\n)*[^\n]*\n).*?^```$", re.MULTILINE | re.DOTALL)


def rerun(page: str) -> str:
    """The page with every console block filled anew. Raises RuntimeError where a command fails."""
    return BLOCK.sub(lambda block: f"```console\n$ {block[1]}{output(block[1])}```", page)


def output(command: str) -> str:
    """What a command line prints."""
    printed = io.StringIO()
    argv = shlex.split(command.replace("\\\n", " "))
    with mock.patch("sys.argv", argv), contextlib.redirect_stdout(printed):
        code = cli.main()
    if code:
        raise RuntimeError(f"exit code {code}: {command}")
    return printed.getvalue()


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(rerun(path.read_text()))
