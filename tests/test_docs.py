"""Every Python block in README and docs runs, and prints what the text block after it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run_and_print_what_is_shown(page: Path) -> None:
    names: dict[str, object] = {}
    printed = io.StringIO()
    for language, text in BLOCK.findall(page.read_text()):
        if language == "python":
            with contextlib.redirect_stdout(printed):
                exec(compile(text, str(page), "exec"), names)
        elif language == "text":
            assert text.strip() in printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target
