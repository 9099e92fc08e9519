"""`lorapre plan --against`: the same training step with AdamW, 8-bit AdamW, GaLore and LoRA."""

import importlib
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from lorapre_recipes.config import UserError, user_errors
from lorapre_recipes.console import binary
from lorapre_recipes.plan.memory import moments, routed
from lorapre_recipes.plan.settings import Settings
from lorapre_recipes.plan.shapes import meta_model
from lorapre_recipes.plan.tables import table
from lorapre_recipes.plan.trace import Trace, trace
from lorapre_recipes.presets import PRETRAIN
from lorapre_recipes.train.optim import DTYPES, build_optimizer, state_bytes, storage_bytes

REFRESH = 200  # steps between two projections of GaLore
Column = dict[str, int]


def against(name: str, settings: Settings) -> str:
    """What is alive at the peak of a step, by optimizer, as a table. Raises UserError."""
    if not settings.low_rank:
        raise UserError("--against: compares lorapre-adamw or lorapre-muon with others")
    if settings.rank == 0:
        raise UserError("--against: GaLore and LoRA have no rank 0; give another --rank")
    if settings.accumulation > 1:
        raise UserError("--against: has no gradients to add to; give --accumulation 1")
    missing = "8-bit AdamW and GaLore are in packages that are not installed here"
    install = "pip install 'lorapre[bench]'"
    with user_errors(f"--against: {missing}: {install}", ModuleNotFoundError):
        columns = dict(contenders(name, settings))
    kinds = ("weights", "gradients", "state", "activations", "logits", "transient")
    body = [(kind, *(binary(column[kind]) for column in columns.values())) for kind in kinds]
    sums = (binary(sum(column.values())) for column in columns.values())
    return table(("At the peak", *columns), [*body, ("all of it", *sums)])


def contenders(name: str, settings: Settings) -> Iterator[tuple[str, Column]]:
    """The columns of the table."""
    model = meta_model(name, DTYPES[settings.dtype])
    weights, parameters = routed(model, settings), list(model.parameters())
    found = trace(model, settings)
    best = max(moments(weights, settings, found), key=lambda memory: memory.peak)._asdict()
    best["state"] = best.pop("matrices") + best.pop("dense")
    del best["adamw"]
    yield "LoRA-Pre", best
    held = {"weights": storage_bytes(*parameters)}
    trained = [p for p in parameters if p.requires_grad]
    # Fused as in transformers' Trainer; that of 8 bits is compiled. Their steps take no more.
    dense = 2 * storage_bytes(*trained) + 4 * len(trained)
    yield "AdamW", at_peak(found, held | {"state": dense}, 0)
    eight = importlib.import_module("torchao.optim").AdamW8bit(trained)
    buffers = [eight._new_buffer(p, signed) for p in trained for signed in (True, False)]
    yield "8-bit AdamW", at_peak(found, held | {"state": storage_bytes(*buffers)}, 0)
    state, transient = galore(model, settings)
    yield "GaLore", at_peak(found, held | {"state": state}, transient)
    base = meta_model(name, DTYPES[settings.dtype])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(base, LoraConfig(r=settings.rank or 0, target_modules="all-linear"))
    held = {"weights": storage_bytes(*base.parameters())}
    adapters = storage_bytes(*(p for p in base.parameters() if p.requires_grad))
    yield "LoRA", at_peak(trace(base, settings), held | {"state": 2 * adapters}, adapters)


def at_peak(found: Trace, held: Column, transient: int) -> Column:
    """What is alive at the peak of the backward pass or in the step, whichever is more."""
    passes = list(found.moments())
    step = passes[-1] | {"transient": transient}
    return held | max(*passes, step, key=lambda alive: sum(alive.values()))


def galore(model: PreTrainedModel, settings: Settings) -> tuple[int, int]:
    """Bytes of GaLore's state, and of what two steps take beside it. The model has been traced."""
    config = PRETRAIN["llama-tiny"]("galore").replace(rank=settings.rank, refresh=REFRESH)
    parameters: list[Any] = list(model.parameters())
    found = Trace(None)
    with parameters[0].fake_mode:
        optimizer = build_optimizer(model, config)
        for p in parameters:
            for x in (p, p.grad) if p.requires_grad else (p,):
                found.known[x.untyped_storage()._cdata] = -1
        with found:
            optimizer.step()
            optimizer.step()
    state = state_bytes(optimizer)
    changes = (change for _, change, _ in found.events)
    return state, max(itertools.accumulate(changes)) - state
