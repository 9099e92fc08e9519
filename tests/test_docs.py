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


OPTIONAL = {"timm"}  # needs the torchvision of torch's build, which is not on PyPI for the CPU


@pytest.mark.filterwarnings(
    "ignore:.*pin_memory.* no accelerator",  # the Trainer without a GPU
    "ignore:.*does not have many workers",  # Lightning
    "ignore:.*LeafSpec.* is deprecated",  # Lightning
)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run_and_print_what_is_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = io.StringIO()
    missing = set()
    for language, text in BLOCK.findall(page.read_text()):
        if language == "python":
            try:
                with contextlib.redirect_stdout(printed):
                    exec(compile(text, str(page), "exec"), names)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL:
                    raise
                missing.add(error.name)
        elif language == "text":
            assert text.strip() in printed.getvalue()
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; all other blocks ran")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target
