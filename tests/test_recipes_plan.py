"""`lorapre plan`: predicted bytes against what optimizers allocate."""

import contextlib
import json
import re
import runpy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from allocations import peak_bytes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import AdamW, Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import BertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig

from lorapre import LoRAPreAdamW, LoRAPreMuon, coverage, gradient_release, param_groups
from lorapre.batch import transient_bytes
from lorapre.groups import matrix_shape
from lorapre_recipes.config import PretrainConfig
from lorapre_recipes.console import binary, short
from lorapre_recipes.plan.memory import Weight, memory, routed
from lorapre_recipes.plan.settings import ONE_GPU, Mesh, Settings
from lorapre_recipes.plan.shapes import BUILT_IN, meta_model
from lorapre_recipes.plan.tables import render
from lorapre_recipes.train.optim import DTYPES, WithAdamW, storage_bytes
from lorapre_recipes.train.pretrain import build_model
from tiny_runs import write_corpus

RANK = 4
DOCS = Path(__file__).parents[1] / "docs"


def llama(hidden: int = 64, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    return LlamaForCausalLM(config).to(dtype)


def build(model: nn.Module, settings: Settings) -> Optimizer:
    """The optimizer that a plan is for."""
    if settings.optimizer == "adamw":
        return AdamW(model.parameters())
    if settings.optimizer == "muon":
        groups = param_groups(model, rank=1)
        matrices = [{"params": group["params"]} for group in groups if group["rank"] is not None]
        rest = [{"params": group["params"]} for group in groups if group["rank"] is None]
        return WithAdamW(
            torch.optim.Muon(matrices, weight_decay=0.0), torch.optim.AdamW(rest, weight_decay=0.0)
        )
    groups = param_groups(model, rank=settings.rank, ends=settings.ends)
    options: dict[str, Any] = {"variant": settings.variant}
    options["momentum_dtype"] = {"fp32": "float32", "bf16": "bfloat16"}[settings.momentum_dtype]
    if settings.optimizer == "lorapre-muon":
        return LoRAPreMuon(groups, **options)
    return LoRAPreAdamW(groups, **options)


def fill_gradients(model: nn.Module) -> None:
    """Random gradients, placed as the weights are."""
    for p in model.parameters():
        if isinstance(p, DTensor):
            part = torch.randn_like(p.to_local())
            p.grad = DTensor.from_local(
                part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )
        else:
            p.grad = torch.randn_like(p)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all state tensors on this process."""
    tensors = [x for state in optimizer.state.values() for x in state.values()]
    parts = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(x.numel() * x.element_size() for x in parts)


LOW_RANK = [
    *({"variant": variant} for variant in ("split", "paper")),
    {"optimizer": "lorapre-muon", "variant": "subspace"},
    {"variant": "paper", "momentum_dtype": "bf16"},
]
ENDS = {"rank": RANK, "ends": "low-rank"}
ALL = [
    *({"rank": RANK, **options} for options in LOW_RANK),
    *(ENDS, ENDS | {"optimizer": "lorapre-muon"}),
    *({"rank": 0, "optimizer": name, "ends": "low-rank"} for name in ("lorapre-adamw", "lorapre-muon")),
    *({"optimizer": "adamw"}, {"optimizer": "muon"}),
]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(str(value) for name, value in options.items() if name != "rank")


# State


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("options", ALL, ids=name_of)
def test_state_is_what_the_optimizer_allocates(options: dict[str, Any], dtype: Any) -> None:
    settings = Settings(dtype=dtype, **options)
    model = llama(dtype=DTYPES[settings.dtype])
    optimizer = build(model, settings)
    fill_gradients(model)
    optimizer.step()
    planned = memory(routed(model, settings), settings)
    assert planned.state == state_bytes(optimizer)
    assert planned.weights == sum(p.numel() * p.element_size() for p in model.parameters())

    adamw = AdamW(model.parameters())
    adamw.step()
    assert planned.adamw == state_bytes(adamw)


def check_peak(weights: list[Weight], settings: Settings, counted: int) -> None:
    """A planned peak is never too low, and too high by no more than what the library may take at most."""
    planned = memory(weights, settings).peak
    alike = Counter(weight.shape for weight in weights)
    library = 0
    for weight in weights:
        E, p, q = matrix_shape(weight.shape, weight.flatten)
        library = max(library, transient_bytes(E * alike[weight.shape], p, q, weight.rank or 0))
    assert counted <= planned <= counted + library


def train_one_step(settings: Settings) -> tuple[list[Weight], int]:
    """The weights of a model whose activations are small, and the peak of a training step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=8_000,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(DTYPES[settings.dtype])
    optimizer = (
        AdamW(model.parameters(), foreach=True) if settings.optimizer == "adamw" else build(model, settings)
    )
    if settings.release:
        gradient_release(model, optimizer)
    tokens = torch.zeros(1, 2, dtype=torch.int64)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    counted = peak_bytes(step) + storage_bytes(*model.parameters()) + state_bytes(optimizer)
    return routed(model, settings), counted


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 64},
        {"rank": 64, "release": True},
        {"rank": 64, "optimizer": "lorapre-muon"},
        {"rank": 64, "optimizer": "lorapre-muon", "release": True},
        {"optimizer": "adamw"},
    ],
    ids=name_of,
)
def test_peak_is_what_a_training_step_allocates(options: dict[str, Any], dtype: Any) -> None:
    settings = Settings(dtype=dtype, **options)
    weights, counted = train_one_step(settings)
    if settings.optimizer == "adamw":
        assert memory(weights, settings).peak == pytest.approx(counted, rel=0.05)
    else:
        check_peak(weights, settings, counted)


def test_routes_are_those_of_coverage() -> None:
    settings = Settings(rank=RANK)
    model = llama()
    rows = {row.name: row for row in coverage(build(model, settings))}
    for weight in routed(model, settings):
        row = rows[weight.name]
        assert (weight.matrix, weight.rank) == (row.route == "low-rank", row.rank)
        assert weight.state_bytes(ONE_GPU) == row.planned_bytes


# Meshes: torch's fake process group makes any world in one process.


@contextlib.contextmanager
def fake_world(mesh: Mesh) -> Iterator[None]:
    size = mesh.replicas * mesh.shards * mesh.tp
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


COLWISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWWISE = ("self_attn.o_proj", "mlp.down_proj")


def spread(model: LlamaForCausalLM, mesh: Mesh) -> None:
    """Tensor parallelism, then FSDP2 over one or two dimensions of a mesh."""
    devices = init_device_mesh(
        "cpu", (mesh.replicas, mesh.shards, mesh.tp), mesh_dim_names=("replicas", "shards", "tp")
    )
    if mesh.tp > 1:
        for layer in model.model.layers:
            styles = {name: ColwiseParallel() for name in COLWISE} | {
                name: RowwiseParallel() for name in ROWWISE
            }
            parallelize_module(layer, devices["tp"], styles)
        ends = {"model.embed_tokens": RowwiseParallel(), "lm_head": ColwiseParallel()}
        planned = {name: style for name, style in ends.items() if name in (model.tp_plan or {})}
        parallelize_module(model, devices["tp"], planned)  # older transformers replicate one end, or both
    if mesh.replicas * mesh.shards > 1:
        data = devices["replicas", "shards"] if mesh.replicas > 1 else devices["shards"]
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=data, reshard_after_forward=True)


MESHES = ["fsdp=4", "hsdp=2x2", "tp=2", "fsdp=2,tp=2", "hsdp=2x3,tp=2", "fsdp=8"]


@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("options", LOW_RANK, ids=name_of)
def test_state_on_any_mesh(options: dict[str, Any], text: str) -> None:
    settings = Settings(rank=RANK, **options)
    mesh = Mesh.parse(text)
    model = llama(hidden=96)
    weights = routed(model, settings)
    with fake_world(mesh):
        spread(model, mesh)
        optimizer = build(model, settings)
        fill_gradients(model)
        optimizer.step()
        assert state_bytes(optimizer) == memory(weights, settings, mesh).state


GLOO = [{"variant": "split"}, {"optimizer": "lorapre-muon", "variant": "subspace"}]


def check_on_two_processes(rank: int, store: str) -> None:
    """State under real FSDP2 (row shards) and TP (row and column shards)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for text in ("fsdp=2", "tp=2"):
        for options in GLOO:
            settings, mesh = Settings(rank=RANK, **options), Mesh.parse(text)
            torch.manual_seed(0)
            model = llama()
            weights = routed(model, settings)
            spread(model, mesh)
            optimizer = build(model, settings)
            tokens = torch.arange(8).view(1, 8)
            for _ in range(2):
                model(input_ids=tokens).logits.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert state_bytes(optimizer) == memory(weights, settings, mesh).state
    dist.destroy_process_group()


def test_state_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(check_on_two_processes, (str(tmp_path / "store"),), nprocs=2)


def test_uneven_shards_are_counted_where_they_are_largest() -> None:
    settings = Settings(rank=RANK, variant="paper")
    mesh = Mesh.parse("fsdp=7")
    model = llama()
    weights = routed(model, settings)
    with fake_world(mesh):
        spread(model, mesh)
        optimizer = build(model, settings)
        fill_gradients(model)
        optimizer.step()
        assert state_bytes(optimizer) == memory(weights, settings, mesh).state


# Models


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.738),
        ("llama-3.1-8b", 8.030),
        ("meta-llama/Llama-3.1-70B", 70.554),
        ("llama-3.1-405b", 405.853),
    ],
)
def test_built_in_models_have_the_published_sizes(name: str, billions: float) -> None:
    model = meta_model(name, torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize("config", [BertConfig(), GPT2Config(), MixtralConfig()], ids=lambda c: c.model_type)
def test_configs_of_other_models(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    meshes = [Mesh.parse("fsdp=8"), Mesh.parse("hsdp=2x16")]
    text, _ = render(str(tmp_path / "config.json"), Settings(rank=8), meshes)
    assert text.count("one GPU") == 1
    assert text.splitlines()[1:] == render(str(tmp_path), Settings(rank=8), meshes)[0].splitlines()[1:]


# The command


Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("optimizer", ["lorapre-adamw", "lorapre-muon", "adamw", "muon"])
@pytest.mark.parametrize("model", sorted(BUILT_IN))
def test_tables_fit_eighty_columns(lorapre: Run, model: str, optimizer: str) -> None:
    rank = ["--rank", "256"] if optimizer.startswith("lorapre") else []
    tp = "" if model == "llama-1b" else ",tp=4"  # its MLP is 5461 wide
    meshes = ["--mesh", "fsdp=1024", "--mesh", f"hsdp=128x8{tp}", "--mesh", f"fsdp=128{tp}"]
    code, out, err = lorapre("plan", model, *rank, "--optimizer", optimizer, *meshes)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80


def test_a_preset_has_its_rank(lorapre: Run) -> None:
    assert lorapre("plan", "llama-60m") == lorapre("plan", "llama-60m", "--rank", "128")
    assert "lorapre-muon, rank 32" in lorapre("plan", "llama-tiny", "--optimizer", "lorapre-muon")[1]
    assert lorapre("plan", "llama-60m", "--optimizer", "adamw")[0] == 0


def test_a_run_folder_has_its_model_and_options(lorapre: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = write_corpus(tmp_path)
    sizes = ["--data", data, "--steps", 2, "--batch-size", 2, "--vocab-size", 300, "--layers", 1]
    own = ["--rank", 7, "--variant", "paper", "--dtype", "bf16", "--rules", "lm_head=5"]
    assert lorapre("pretrain", *sizes, *own, "--freeze", "embed_tokens", "--out", run)[0] == 0
    code, out, err = lorapre("plan", run)
    assert (code, err) == (0, "")
    head = ["lorapre-adamw, rank 7, paper, bf16 weights", "rules: lm_head=5", "frozen: embed_tokens"]
    assert out.splitlines()[1:4] == head
    numel = build_model(PretrainConfig.load(run / "config.json"), 0).num_parameters()
    assert f"{short(numel)} parameters in bf16" in out
    planned = json.loads((run / "summary.json").read_text())["state_bytes"]
    assert re.search(rf"optimizer state +{re.escape(binary(planned))}", out)
    # What is given goes over the run's; another optimizer takes none of its options.
    assert "rank 3, paper" in lorapre("plan", run, "--rank", 3)[1]
    assert lorapre("plan", run, "--optimizer", "adamw")[1].splitlines()[1] == "adamw"
    assert "--rank: lorapre-muon needs a value" in lorapre("plan", run, "--optimizer", "lorapre-muon")[2]


MISTAKES: dict[str, tuple[str, ...]] = {
    "there is no such folder": ("./nowhere", "--rank", "8"),
    "not built in": ("no-such-model", "--rank", "8"),
    "needs a value": ("llama-3.1-8b",),
    "at least 1": ("llama-60m", "--rank", "0", "--variant", "paper"),
    "no rank 0": ("llama-60m", "--rank", "0", "--against"),
    "no trainable parameter": ("llama-60m", "--rank", "9999"),
    "no such option": ("llama-60m", "--optimizer", "adamw", "--rank", "8"),
    "write fsdp=SHARDS": ("llama-60m", "--rank", "8", "--mesh", "8"),
    "--mesh ''": ("llama-60m", "--rank", "8", "--mesh", ""),
    "--mesh ',tp=8'": ("llama-60m", "--rank", "8", "--mesh", ",tp=8"),
    "--mesh 'fsdp=0'": ("llama-60m", "--rank", "8", "--mesh", "fsdp=0"),
    "--mesh 'fsdp=2tp=2'": ("llama-60m", "--rank", "8", "--mesh", "fsdp=2tp=2"),
    "8 key-value heads": ("llama-60m", "--rank", "8", "--mesh", "tp=16"),
    "dimension 0 of": ("llama-1b", "--rank", "8", "--mesh", "tp=2"),  # 5461 is odd
    "not 4": ("llama-60m", "--rank", "8", *("--mesh", "fsdp=2") * 4),
    "--release: adamw": ("llama-60m", "--optimizer", "adamw", "--release"),
    "leave out --mesh": ("llama-60m", "--rank", "8", "--release", "--mesh", "fsdp=2"),
    "fp16": ("llama-60m", "--rank", "8", "--dtype", "fp16"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_get_one_line(lorapre: Run, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no model hub, no waiting for one
    code, out, err = lorapre("plan", *MISTAKES[message])
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


def test_tensor_parallelism_needs_a_plan(tmp_path: Path, lorapre: Run) -> None:
    GPT2Config().save_pretrained(tmp_path)
    code, _, err = lorapre("plan", str(tmp_path), "--rank", "8", "--mesh", "tp=4")
    assert code == 2
    assert "no tensor-parallel plan for gpt2" in err


def test_the_page_on_scaling_is_what_the_commands_print() -> None:
    if "model.embed_tokens" not in (llama().tp_plan or {}):
        pytest.skip("the page has the plans of newer transformers, which shard the embeddings too")
    page = (DOCS / "scaling.md").read_text()
    rerun = runpy.run_path(str(DOCS / "console.py"))["rerun"]
    assert page.count("| `lorapre plan ") == page.count("lorapre plan llama") == 7
    assert rerun(page) == page  # else: python docs/console.py docs/scaling.md
