"""Runs that meet with an accident lose nothing but the steps since the last checkpoint.

A few of each here; `make stress` has more (stress.py), and docs/reliability.md the counts.
"""

import json
import random
import shutil
from pathlib import Path

import pytest

import stress
from cases import CASES
from lorapre_recipes.config import UserError
from lorapre_recipes.train.runs import MANIFEST, damage, last_checkpoint, model_folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> stress.Runs:
    return stress.Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def cut(runs: stress.Runs) -> Path:
    """A run that was killed; it has two checkpoints."""
    return runs.cut_off("cut-off")


@pytest.fixture
def run(runs: stress.Runs, cut: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of it."""
    name = "".join(x for x in request.node.name if x.isalnum())
    return Path(shutil.copytree(cut, runs.folder / name))


# --- processes that die


def test_killed_at_any_moment_a_run_goes_on_with_the_losses_of_one_never_killed(runs: stress.Runs) -> None:
    assert stress.kill(runs, 2, random.Random(0))["killed"] == 2


def test_a_run_that_was_cut_off_after_its_last_checkpoint_is_ended(runs: stress.Runs) -> None:
    run = Path(shutil.copytree(runs.folder / "whole", runs.folder / "at-the-end"))
    (run / "summary.json").unlink()
    assert runs.run("--resume", run.name) == 0, runs.log()
    runs.assert_equals_whole(run.name)
    was, now = (json.loads((x / "summary.json").read_text()) for x in (runs.folder / "whole", run))
    changing = ("seconds", "per_second", "bytes", "share")
    assert {k: v for k, v in now.items() if not k.endswith(changing)} == {
        k: v for k, v in was.items() if not k.endswith(changing)
    }
    assert now["state_bytes"] == was["state_bytes"]


def test_a_loader_that_fails_costs_the_steps_since_the_checkpoint(runs: stress.Runs) -> None:
    assert stress.fail(runs, 1, random.Random(0)).total() == 1


def test_a_disk_that_is_full_in_a_checkpoint_is_one_line(runs: stress.Runs) -> None:
    assert stress.fill(runs, 1, random.Random(0)).total() == 1


# --- checkpoints that are not what was written


def test_damage_in_any_file_is_found(runs: stress.Runs) -> None:
    stress.spoil_unread(runs, 60, random.Random(0))


def test_damage_in_the_manifest_is_found(run: Path) -> None:
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    manifest = checkpoint / MANIFEST
    content = manifest.read_text()
    for damaged in ("", content[:-20], content.replace('"files"', '"file"'), "[]", "{}", '{"files": []}'):
        manifest.write_text(damaged)
        assert damage(checkpoint) == "manifest.json is not what was written"
    manifest.write_bytes(content.encode()[:40] + b"\xff" + content.encode()[41:])
    assert damage(checkpoint) is not None
    manifest.unlink()
    assert damage(checkpoint) == "manifest.json is missing"


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(runs: stress.Runs) -> None:
    assert stress.spoil(runs, 2, random.Random(0)).total() == 2


def test_a_run_without_a_sound_checkpoint_is_refused(runs: stress.Runs, run: Path) -> None:
    for checkpoint in run.glob("checkpoint-*"):
        stress.truncate(checkpoint / "model.safetensors", random.Random(0))
    assert runs.run("--resume", run.name) == 2
    first, second, last = runs.log().splitlines()
    assert "checkpoint-21 is damaged (model.safetensors" in first
    assert "checkpoint-18 is damaged (model.safetensors" in second
    assert second.endswith("there is no other checkpoint")
    assert last.startswith(f"lorapre: --resume {run.name}: no checkpoint in this run folder; start again")
    assert {path.name for path in (run / "damaged").iterdir()} == {"checkpoint-18", "checkpoint-21"}


def test_a_model_is_not_taken_from_a_damaged_checkpoint(run: Path) -> None:
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    assert model_folder(str(run)) == str(checkpoint)
    stress.flip(checkpoint / "model.safetensors", random.Random(0))
    with pytest.raises(UserError, match=r"checkpoint-21 is damaged \(model.* before it is .*-18$"):
        model_folder(str(run))


# --- checkpoints of others


@pytest.mark.parametrize("kind", ["rank", "version"])
def test_the_checkpoint_of_another_run_is_refused_in_one_line(kind: str, runs: stress.Runs) -> None:
    assert stress.exchange(runs, 1, random.Random(0), [kind]).total() == 1


def test_a_manifest_says_which_version_wrote_it(cut: Path) -> None:
    manifest = json.loads((cut / "checkpoint-21" / MANIFEST).read_text())
    assert manifest["lorapre"]
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= manifest["files"].keys()


# --- gradients that are no numbers


@pytest.mark.parametrize("name", CASES)
def test_steps_skipped_at_random_are_as_if_there_had_been_no_gradient(name: str) -> None:
    assert stress.poison(name, random.Random(1)) > 50
