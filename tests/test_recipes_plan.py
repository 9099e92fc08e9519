"""`lorapre plan`: predicted bytes of state and of traffic against what optimizers allocate and send."""

import contextlib
import runpy
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
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig

from lorapre import LoRAPreAdamW, LoRAPreMuon, coverage, gradient_release, param_groups
from lorapre_recipes.plan.memory import memory
from lorapre_recipes.plan.settings import ONE_GPU, Mesh, Settings
from lorapre_recipes.plan.shapes import BUILT_IN, meta_model
from lorapre_recipes.plan.tables import render
from lorapre_recipes.plan.traffic import (
    fsdp_traffic,
    gather_traffic,
    most_row_shards,
    optimizer_traffic,
)
from lorapre_recipes.plan.weights import routed
from lorapre_recipes.train.optim import DTYPES, WithAdamW, storage_bytes

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
    groups = param_groups(model, rank=settings.rank)
    variant = settings.variant
    if settings.optimizer == "lorapre-muon":
        return LoRAPreMuon(groups, variant=variant)
    return LoRAPreAdamW(groups, variant=variant, compress=settings.compress or "both")


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
    *({"variant": variant} for variant in ("paper", "calibrated", "subspace", "split")),
    *({"variant": variant, "compress": "first"} for variant in ("calibrated", "subspace")),
    *({"variant": variant, "compress": "second"} for variant in ("calibrated", "subspace")),
    *({"optimizer": "lorapre-muon", "variant": variant} for variant in ("paper", "calibrated", "subspace")),
]
ALL = [*({"rank": RANK, **options} for options in LOW_RANK), {"optimizer": "adamw"}, {"optimizer": "muon"}]


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


def train_one_step(settings: Settings) -> tuple[int, int]:
    """Peak of a training step, planned and counted, of a model whose activations are small."""
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
    return memory(routed(model, settings), settings).peak, counted


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
    planned, counted = train_one_step(Settings(dtype=dtype, **options))
    assert planned == pytest.approx(counted, rel=0.05)


def test_routes_are_those_of_coverage() -> None:
    settings = Settings(rank=RANK)
    model = llama()
    rows = {row.name: row for row in coverage(build(model, settings))}
    for weight in routed(model, settings):
        row = rows[weight.name]
        assert (weight.matrix, weight.rank) == (row.route == "low-rank", row.rank)
        assert weight.state_bytes(ONE_GPU) == row.planned_bytes


# Meshes: torch's fake process group makes any world in one process. What it sends is nobody's, but as long.


class Counter:
    """Bytes that this process sends, by the ring's price, in the collectives it calls."""

    def __init__(self) -> None:
        self.sent = 0.0

    def all_reduce(self, x: torch.Tensor, *args: Any, group: Any, **options: Any) -> None:
        self.sent += 2 * self._others(group) * x.nbytes
        return self.originals["all_reduce"](x, *args, group=group, **options)

    def all_to_all_single(
        self, out: torch.Tensor, x: torch.Tensor, received: Any, sent: Any, group: Any
    ) -> None:
        me, row = dist.get_rank(group), out.element_size()
        self.sent += row * max(sum(sent) - sent[me], sum(received) - received[me])
        self.originals["all_to_all_single"](out, x, received, sent, group=group)

    @staticmethod
    def _others(group: Any) -> float:
        size = dist.get_world_size(group)
        return (size - 1) / size

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        names = [name for name in vars(Counter) if name.startswith("all_")]
        self.originals = {name: getattr(dist, name) for name in names}
        for name in names:
            setattr(dist, name, getattr(self, name))
        try:
            yield
        finally:
            for name, original in self.originals.items():
                setattr(dist, name, original)


@contextlib.contextmanager
def fake_world(size: int) -> Iterator[None]:
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
def test_state_and_traffic_of_any_mesh(options: dict[str, Any], text: str) -> None:
    settings = Settings(rank=RANK, **options)
    mesh = Mesh.parse(text)
    model = llama(hidden=96)
    weights = routed(model, settings)
    counter = Counter()
    with fake_world(mesh.gpus):
        spread(model, mesh)
        optimizer = build(model, settings)
        fill_gradients(model)
        optimizer.step()  # the first step makes the state, and sums what it starts from
        with counter.counting():
            optimizer.step()
        assert state_bytes(optimizer) == memory(weights, settings, mesh).state
    assert counter.sent == pytest.approx(sum(optimizer_traffic(weights, settings, mesh).values()), rel=1e-9)


GLOO = [{"variant": "subspace"}, {"variant": "calibrated"}, {"optimizer": "lorapre-muon"}]


def check_on_two_processes(rank: int, store: str) -> None:
    """State and traffic under real FSDP2 (row shards) and TP (row and column shards)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for text in ("fsdp=2", "tp=2"):
        for options in GLOO:
            settings, mesh, counter = Settings(rank=RANK, **options), Mesh.parse(text), Counter()
            torch.manual_seed(0)
            model = llama()
            weights = routed(model, settings)
            spread(model, mesh)
            optimizer = build(model, settings)
            tokens = torch.arange(8).view(1, 8)
            for _ in range(2):
                model(input_ids=tokens).logits.square().mean().backward()
                counter.sent = 0.0
                with counter.counting():
                    optimizer.step()
                optimizer.zero_grad()
            assert state_bytes(optimizer) == memory(weights, settings, mesh).state
            expected = sum(optimizer_traffic(weights, settings, mesh).values())
            assert counter.sent == pytest.approx(expected, rel=1e-9)
    dist.destroy_process_group()


def test_state_and_traffic_of_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(check_on_two_processes, (str(tmp_path / "store"),), nprocs=2)


def test_uneven_shards_are_counted_where_they_are_largest() -> None:
    settings = Settings(rank=RANK, variant="subspace")
    mesh = Mesh.parse("fsdp=7")
    model = llama()
    weights = routed(model, settings)
    with fake_world(mesh.gpus):
        spread(model, mesh)
        optimizer = build(model, settings)
        fill_gradients(model)
        optimizer.step()
        assert state_bytes(optimizer) == memory(weights, settings, mesh).state


class FSDPCounter(TorchDispatchMode):
    """Bytes that this process sends in the collectives that torch dispatches."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh, self.sent = mesh, 0.0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name()
        others = (self.mesh.shards - 1) / self.mesh.shards
        if name == "c10d::_allgather_base_":
            self.sent += others * args[0].nbytes
        elif name == "c10d::_reduce_scatter_base_":
            self.sent += others * args[1].nbytes
        elif name == "c10d::allreduce_":
            self.sent += 2 * (self.mesh.replicas - 1) / self.mesh.replicas * args[0][0].nbytes
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("text", ["fsdp=4", "fsdp=7", "hsdp=2x4"])
def test_fsdp_traffic_is_counted(text: str) -> None:
    mesh, model = Mesh.parse(text), llama()
    weights = routed(model, Settings(optimizer="adamw"))
    with fake_world(mesh.gpus):
        spread(model, mesh)
        with FSDPCounter(mesh) as counter:
            model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    assert counter.sent == pytest.approx(fsdp_traffic(weights, mesh, 4))


def test_gathering_moves_the_matrix() -> None:
    settings = Settings(rank=RANK)
    weight = next(w for w in routed(llama(), settings) if w.matrix)
    assert gather_traffic(weight, 4, Mesh(shards=64)) == 63 / 64 * 64 * 64 * 4
    assert gather_traffic(weight, 4, Mesh(replicas=8, shards=8)) == 7 / 8 * 64 * 64 * 4
    assert gather_traffic(weight, 4, ONE_GPU) == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_replicated_A_pays_up_to_so_many_row_shards(dtype: Any) -> None:
    settings = Settings(rank=128, dtype=dtype)
    weights = {w.name: w for w in routed(meta_model("llama-3.1-8b", DTYPES[settings.dtype]), settings)}
    weight = weights["model.layers.0.self_attn.q_proj.weight"]
    most = most_row_shards(weight, settings)
    assert most == {"fp32": 2 * 4096 // 129 - 1, "bf16": 4096 // 129 - 1}[dtype]  # 2 p / (r + 1) - p / q
    for shards in (8, 16, 32, 64):
        mesh = Mesh(shards=shards)
        pays = weight.state_bytes(mesh) < weight.adamw_bytes(mesh, settings.item)
        assert pays == (shards <= most)


def test_muons_matrices_are_not_divided_beyond_one_for_each_gpu() -> None:
    settings = Settings(rank=128, optimizer="lorapre-muon")
    weights = routed(meta_model("llama-3.1-8b", torch.float32), settings)
    name = "model.layers.0.mlp.down_proj.weight"
    by_shards = {n: optimizer_traffic(weights, settings, Mesh(shards=n))[name] for n in (32, 64, 1024)}
    assert by_shards[32] < by_shards[64] < by_shards[1024] < 1.1 * by_shards[32]


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
    text = render(str(tmp_path / "config.json"), Settings(rank=8), meshes)
    assert text.count("one GPU") == 2
    assert text.splitlines()[1:] == render(str(tmp_path), Settings(rank=8), meshes).splitlines()[1:]


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


MISTAKES: dict[str, tuple[str, ...]] = {
    "there is no such folder": ("./nowhere", "--rank", "8"),
    "not built in": ("no-such-model", "--rank", "8"),
    "needs a value": ("llama-60m",),
    "at least 1": ("llama-60m", "--rank", "0"),
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
    assert page.count("$ lorapre plan") == page.count("```console") == 12
    assert rerun(page) == page  # else: python docs/console.py docs/scaling.md
