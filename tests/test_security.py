"""Nothing in library or recipes unpickles or runs code from a file or a hub."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.trainer_pt_utils import safe_globals

from lorapre_recipes.train.pretrain import pretrain
from tiny_runs import tiny_config, write_corpus

SRC = Path(__file__).parents[1] / "src"
FILES = sorted(SRC.rglob("*.py"))

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
READS_PICKLES = {"read_pickle", "load_state_dict_from_url", "unsafe_load", "full_load"}
HUB = {"torch.hub.load", "hub.load"}


def dangers(source: str) -> Iterator[str]:
    """What a file could use to run code that it was handed as data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if PICKLES & {*module, *(alias.name for alias in node.names)}:
                yield f"from {node.module}"
        elif isinstance(node, ast.Call):
            yield from _dangers_of_call(node)
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield "trust_remote_code"


def _dangers_of_call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = {word.arg: word.value for word in node.keywords}
    name = called.rpartition(".")[2]
    if called in RUNS_CODE or called in HUB or name in READS_PICKLES:
        yield called
    if "trust_remote_code" in given:
        yield "trust_remote_code"
    if called in ("torch.load", "load") or called.endswith("serialization.load"):
        safe = given.get("weights_only")
        if not (isinstance(safe, ast.Constant) and safe.value is True):
            yield f"{called} without weights_only=True"
    for word, value in (("weights_only", False), ("allow_pickle", True), ("shell", True)):
        if word in given and not (isinstance(given[word], ast.Constant) and given[word].value is not value):
            yield f"{word}={ast.unparse(given[word])}"
    if called == "yaml.load":
        yield called


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_no_file_unpickles_or_runs_what_it_reads(path: Path) -> None:
    assert not list(dangers(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "from torch import pickle",
        "torch.load(file)",
        "torch.load(file, weights_only=safe)",
        "torch.serialization.load(file, weights_only=False)",
        "numpy.load(file, allow_pickle=True)",
        "numpy.load(file, allow_pickle=flag)",
        "pandas.read_pickle(file)",
        "torch.hub.load(repository, name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, **{'trust_remote_code': True})",
        "subprocess.run(line, shell=True)",
        "yaml.load(file)",
        "eval(text)",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert list(dangers(line))


def test_the_search_passes_what_is_safe() -> None:
    assert not list(dangers("torch.load(file, weights_only=True); json.load(file); re.compile(text)"))


def test_checkpoints_hold_nothing_that_needs_unpickling(tmp_path: Path) -> None:
    """training_args.bin, which the Trainer writes, is a pickle of a class."""
    config = tiny_config(data=str(write_corpus(tmp_path)), layers=1, steps=2, evaluations=1, checkpoints=1)
    pretrain(config, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    names = {path.name for path in checkpoint.rglob("*") if path.is_file()}
    assert "training_args.bin" not in names
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt"} <= names
    with safe_globals():  # numpy's random state, which the Trainer allows in the same way
        for name in names:
            kind = Path(name).suffix
            assert kind in (".safetensors", ".json", ".jinja", ".txt", ".pt", ".pth"), name
            if kind in (".pt", ".pth"):
                torch.load(checkpoint / name, weights_only=True)
