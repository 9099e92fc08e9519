"""The scripts in examples/ train, go on from their checkpoints as if nothing had been, and are short."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed import run

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """An example as a module, which is not run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"^step \d+: loss ([\d.]+)$", printed, re.MULTILINE)]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_on_a_screen_and_says_how_to_start_it(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    assert re.search(rf"^    (python|torchrun .*) examples/{path.name} \S+$", text, re.MULTILINE)


def test_nanogpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example: Any = load("nanogpt")
    small = dict(STEPS=12, WARMUP=2, SAVE_EVERY=4, BATCH=4, LENGTH=8, WIDTH=16, HEADS=2, RANK=2, LR=0.02)
    for name, value in small.items():
        monkeypatch.setattr(example, name, value)
    whole, resumed = tmp_path / "whole.pt", tmp_path / "resumed.pt"
    example.main(whole)
    first, *_, last = all_losses = losses(capsys.readouterr().out)
    assert len(all_losses) == 3
    assert last < first

    batch = example.batch
    monkeypatch.setattr(example, "batch", lambda step: {}[step] if step == 6 else batch(step))
    with pytest.raises(KeyError):
        example.main(resumed)
    monkeypatch.setattr(example, "batch", batch)
    example.main(resumed)  # from step 4
    assert losses(capsys.readouterr().out) == all_losses
    (model, optimizer, _), (same, other, _) = (torch.load(path)[1] for path in (whole, resumed))
    torch.testing.assert_close(same, model, rtol=0, atol=0)
    torch.testing.assert_close(other["state"], optimizer["state"], rtol=0, atol=0)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["resumed.pt", "whole.pt"]


@pytest.mark.filterwarnings("ignore:.*pin_memory.* no accelerator")
def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example: Any = load("trainer")
    monkeypatch.setattr(example, "LENGTH", 8)
    whole = example.main(str(tmp_path / "whole"), steps=8)
    logged = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert len(logged) == 4
    assert logged[-1] < logged[0]
    (tmp_path / "whole" / "checkpoint-6").rename(tmp_path / "checkpoint-6")
    (tmp_path / "resumed").mkdir()
    (tmp_path / "checkpoint-6").rename(tmp_path / "resumed" / "checkpoint-6")
    resumed = example.main(str(tmp_path / "resumed"), steps=8)
    assert [row["loss"] for row in resumed.state.log_history if "loss" in row] == logged
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def train_with_fsdp2(folder: Path, out: Path) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        load("fsdp2").main(folder, steps=8)
    if dist.get_rank() == 0:
        out.write_text(printed.getvalue())


def test_fsdp2(tmp_path: Path) -> None:
    folder, out = tmp_path / "sharded", tmp_path / "out"
    run(train_with_fsdp2, 2, folder, out)
    first, *_, last = all_losses = losses(out.read_text())
    assert len(all_losses) == 4
    assert last < first
    (folder / "step-000008" / ".metadata").unlink()  # as if the writing had been cut off
    run(train_with_fsdp2, 2, folder, out)
    assert losses(out.read_text()) == all_losses[3:]
    assert "State is" in out.read_text()
