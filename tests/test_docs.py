"""Every code block in the documentation runs, or is compared with what it names.

| fence                 | what a test does with it                                                         |
|-----------------------|----------------------------------------------------------------------------------|
| python                | runs it, after the blocks above it on the page                                   |
| python title="NAME"   | writes it to NAME, for a command below                                           |
| python title="src/…"  | looks for the functions in that file, as they stand there                        |
| text                  | looks for it in what the page has printed so far                                 |
| bash                  | parses every command; runs what starts a file of the page                        |
| console, `$ lorapre`  | runs the command and compares; without `$` it is the record of a long run        |

A row of a table that begins with a `lorapre plan` command has the memory that the command prints.

Another language, or a command that nobody has said how to check, is an error.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from cyclopts import App

import lorapre
from lorapre.integrations.registry import RoutedAdamW, RoutedMuon
from lorapre.integrations.transformers import lorapre_adamw, lorapre_muon
from lorapre_recipes import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]
BLOCK = re.compile(r"^(`{3,})(\w*)(?: title=\"([^\"]+)\")?([^\n]*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")

OPTIONAL = {"timm"}  # needs the torchvision of torch's build, which is not on PyPI for the CPU
RERUN_ELSEWHERE = {"scaling.md"}  # tests/test_recipes_plan.py
LAUNCHERS = {"torchrun", "accelerate"}


class Block(NamedTuple):
    language: str
    title: str
    text: str

    @property
    def file(self) -> bool:
        """Whether the block is a file of the page. Other titles name a source that the block quotes."""
        return bool(self.title) and not self.title.startswith("src/")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page. A fence that is not in the table above is an error."""
    found = []
    for _, language, title, rest, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        assert language in ("python", "text", "bash", "console"), f"a block of {language!r}: how to check it?"
        assert not rest, f"a fence with {rest!r}"
        found.append(Block(language, title, text))
    return found


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
    for block in blocks(page):
        language, title, text = block
        if block.file:
            (tmp_path / title).write_text(text, encoding="utf-8")
        elif language == "python" and not title:
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
def test_commands_are_what_the_programs_take(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    files = [block for block in blocks(page) if block.file]
    for block in files:
        (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    for language, _, text in blocks(page):
        if language == "bash":
            for command in commands(text):
                check(command, [block.title for block in files], tmp_path)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in RERUN_ELSEWHERE], ids=lambda page: page.name
)
def test_commands_print_what_is_shown(page: Path) -> None:
    """Where it fails: python docs/console.py PAGE."""
    text = page.read_text(encoding="utf-8")
    assert runpy.run_path(str(DOCS / "console.py"))["rerun"](text) == text


@pytest.mark.parametrize(
    "command",
    [
        "lorapre pretrain --no-such-option",
        "lorapre no-such-command",
        "make no-such-target",
        "pip install -c constraints.txt -e '.[no-such-extra]'",
        "pip install -c no-such-file -e .",
        "python benchmarks/step_time.py --no-such-option 3",
        "python benchmarks/departures.py --no-such-option",
        "python no-such-script.py",
        "torchrun --nproc-per-node 2 -m lorapre_recipes pretrain --no-such-option",
        "torchrun --no-such-option -m lorapre_recipes pretrain",
        "accelerate launch --config_file no-such-file -m lorapre_recipes pretrain",
        "no-such-program",
    ],
)
def test_a_wrong_command_is_found(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises((Exception, SystemExit)):
        check(shlex.split(command), [], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


# Pages with the directives of mkdocstrings, which are indented. Code has a fence on every page.
INDENTED = {"optimizers.md", "internals.md", "integrations.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_code_hides_in_a_block_without_a_fence(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    assert "```" not in text
    assert "~~~" not in text
    assert page.name in INDENTED or not re.search(r"^\n(?: {4}|\t)\S", text, re.MULTILINE)


def public() -> dict[str, list[str]]:
    """What docs/compatibility.md calls public, by module."""
    folder = ROOT / "src" / "lorapre" / "integrations"
    names = {f"lorapre.integrations.{file.stem}" for file in folder.glob("[a-z]*.py")}
    return {"lorapre": lorapre.__all__} | {
        name: ast.literal_eval(re.findall(r"^__all__ = (.*)", text, re.MULTILINE)[0])
        for name in sorted(names)
        for text in [(folder / f"{name.rpartition('.')[2]}.py").read_text(encoding="utf-8")]
    }


def test_the_reference_has_every_public_name() -> None:
    pages = (page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = {name for page in pages for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)}
    for module, names in public().items():
        assert module in shown or {f"{module}.{name}" for name in names} <= shown, module


@pytest.mark.parametrize(
    "function",
    [
        *(getattr(lorapre, name) for name in lorapre.__all__),
        RoutedAdamW,
        RoutedMuon,
        lorapre_adamw,
        lorapre_muon,
    ],
    ids=lambda function: function.__name__,
)
def test_the_reference_explains_every_argument(function: Callable[..., object]) -> None:
    text = inspect.getdoc(function) or ""
    arguments = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    explained = re.findall(r"^    (\w+):", arguments, re.MULTILINE)
    assert explained == list(inspect.signature(function).parameters)
    assert inspect.isclass(function) or "\nReturns:\n" in text
    assert "\nRaises:\n" in text or function is lorapre.coverage


NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?(?!\w)"
FIGURE = re.compile(rf"(?<![\w.(/-]){NUMBER}(?: ± {NUMBER})?")


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", DOCS / "index.md", DOCS / "results.md"], ids=lambda page: page.name
)
def test_the_first_pages_have_no_figures_but_those_of_the_pages_they_link_to(page: Path) -> None:
    """Each section and each bullet links to the page that has the command of a figure, or its report."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for part in re.split(r"^(?:#+|\*) ", text, flags=re.MULTILINE):
        sources = [page.parent / target for target in LINK.findall(part) if target.endswith(".md")]
        known = {
            figure
            for source in sources
            if source.name != "LOG.md"  # which has so many figures that any number would be found
            for figure in FIGURE.findall(source.read_text(encoding="utf-8"))
        }
        unknown = {figure for figure in FIGURE.findall(LINK.sub("", part)) if not is_rounded(figure, known)}
        assert not unknown, (unknown, part)


def is_rounded(figure: str, known: set[str]) -> bool:
    """Whether it is a known figure, its mean alone, or one of these rounded."""
    means = {mean for mean, _, _ in (other.partition(" ± ") for other in known)}
    decimals = len(figure.rpartition(".")[2])
    return any(figure in (other, rounded(other, decimals)) for other in known | means)


def rounded(figure: str, decimals: int) -> str:
    """A figure, or a mean ± its deviation, with fewer decimals. Integers stay as they are."""
    numbers = figure.replace(",", "").split(" ± ")
    return " ± ".join(f"{float(n):.{decimals}f}" if "." in n else n for n in numbers)


def test_the_mathematics_names_functions_and_tests_that_exist() -> None:
    text = (DOCS / "maths.md").read_text(encoding="utf-8")
    table = text.partition("## Equation, function, test")[2].partition("\n\n")[2].partition("\n\n")[0]
    rows = [row.split("|")[2:4] for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 10
    for functions, tests in rows:
        assert re.findall(r"\[`test_\w+\.py`\]", tests)  # the test of links looks whether they exist
        for name, file in re.findall(r"\[`([\w.]+)`\]\((.*?)\)", functions):
            path = file.removeprefix("../src/").removesuffix(".py").split("/")
            module = importlib.import_module(".".join(path))
            assert name.startswith(".".join(path[1:]) + "."), name
            functools.reduce(getattr, name.split(".")[len(path) - 1 :], module)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_functions_are_those_of_the_source(page: Path) -> None:
    """Where it fails: python docs/console.py PAGE."""
    text = page.read_text(encoding="utf-8")
    assert runpy.run_path(str(DOCS / "console.py"))["quoted"](text) == text
    assert all(block.text.startswith("def ") for block in blocks(page) if block.title and not block.file)


def test_the_mathematics_quotes_every_function_of_the_variants() -> None:
    source = ast.parse((ROOT / "src" / "lorapre" / "variants.py").read_text(encoding="utf-8"))
    functions = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    shown = "".join(block.text for block in blocks(DOCS / "maths.md") if block.title and not block.file)
    assert set(re.findall(r"^def (\w+)", shown, re.MULTILINE)) >= functions


# Commands


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a bash block, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check(command: Sequence[str], files: Sequence[str], folder: Path) -> None:
    """Fail where a command names an option, a target or a file that is not there; run one of `files`."""
    program, *arguments = [word for word in command if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program = program.removeprefix(".venv/bin/")
    if program == "lorapre":
        parse(cli.app, arguments)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets
    elif program == "pip":
        check_pip(arguments)
    elif program in LAUNCHERS:
        check_launch(program, arguments, files, folder)
    elif program in ("python", "python3"):
        check_python(arguments)
    elif program == "pip-audit":
        pass
    elif program in ("git", "cd"):
        assert arguments[0] in ("clone", "lorapre")
    else:
        raise AssertionError(f"how to check {program!r}?")


def parse(app: App, arguments: Sequence[str]) -> None:
    """Let the command line of an app take the arguments, without running it."""
    app.parse_args([*arguments], exit_on_error=False, print_error=False)


def check_pip(arguments: Sequence[str]) -> None:
    assert arguments[0] == "install"
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = {*re.findall(r"^(\w+) = \[", section.partition("\n[project")[0], re.MULTILINE)}
    for option, word in zip(arguments, [*arguments[1:], ""], strict=True):
        if option == "-c":
            assert (ROOT / word).is_file()
        if wanted := re.search(r"\[(.*)\]", option):
            assert {*wanted[1].split(",")} <= extras


def check_python(arguments: Sequence[str]) -> None:
    script, *options = arguments
    if script == "-m":
        assert options[0] in ("pytest", "venv")
        return
    assert (ROOT / script).is_file()
    if script.startswith("benchmarks/"):
        module = importlib.import_module(Path(script).stem)
        if hasattr(module, "app"):
            parse(module.app, options)
            return
    assert not any(option.startswith("-") for option in options)
    assert all((ROOT / option).exists() for option in options)


def check_launch(program: str, arguments: Sequence[str], files: Sequence[str], folder: Path) -> None:
    """Of torchrun and accelerate: the options, and what they start."""
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args([*arguments])
    else:
        from accelerate.commands.launch import launch_command_parser

        assert arguments[0] == "launch"
        launched = launch_command_parser().parse_args([*arguments[1:]])
        assert (ROOT / launched.config_file).is_file()
    if launched.training_script in files:
        run = [sys.executable, "-m", "torch.distributed.run", *arguments]
        done = subprocess.run(
            run, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
    else:
        assert launched.training_script == "lorapre_recipes"
        parse(cli.app, launched.training_script_args)
