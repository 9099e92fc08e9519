"""Weights spread over processes: the steps of one process, little traffic, checkpoints for any number."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import lorapre.linalg
import lorapre.optimizers
from cases import CASES, assert_same, gradient, parameters
from distributed import run
from lorapre import LoRAPreAdamW, LoRAPreMuon, coverage

STEPS = 8
VARIANTS = ["adam-paper", "adam-split"]
MUON = ["muon-paper", "muon-subspace", "muon-plain"]

# Uneven on 2, 3 and 4 processes, two of one shape; experts, a convolution; dense: a matrix, vector, scalar.
SHAPES = [(13, 21)] * 2 + [(3, 10, 14), (9, 12, 1, 2), (4, 5), (7,), ()]
SMALL = [(2, 9), (9, 2)]  # of rank one: on 3 and 4 processes some hold nothing

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
# Mesh and placements; of a weight that has no such dimension, its last one.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "rows-2": ((2,), (S0,)),
    "rows-3": ((3,), (S0,)),
    "rows-4": ((4,), (S0,)),
    "columns-3": ((3,), (S1,)),
    "columns-4": ((4,), (S1,)),
    "last-2": ((2,), (S2,)),
    "replicated": ((2,), (R,)),
    "hsdp": ((2, 2), (R, S0)),
    "rows-columns": ((2, 2), (S0, S1)),
    "columns-rows": ((2, 2), (S1, S0)),
    "rows-rows": ((2, 2), (S0, S0)),
    "columns-columns": ((2, 2), (S1, S1)),
    "experts-last": ((2, 2), (S0, S2)),
    "middle-last": ((2, 2), (S1, S2)),
}
FEW = ["rows-3", "columns-4", "rows-columns", "middle-last"]


def spread(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A copy of x on the mesh; every process has it all."""
    last = len(x.shape) - 1 if len(x.shape) < 4 else 1  # only rows or input channels of a convolution
    fitting = [Shard(min(p.dim, last)) if isinstance(p, Shard) and x.ndim else R for p in placements]
    return distribute_tensor(x.detach().clone(), mesh, fitting, src_data_rank=None)


def full(x: Tensor) -> Tensor:
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_relative(actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> None:
    """Frobenius norms of the differences over those of the expected."""
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        x, y = full(x).float(), full(y).float()
        error = float(torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y).clamp(min=1e-30))
        assert error <= tolerance, f"weight {i} of shape {tuple(y.shape)}: {error:.1e}"


@contextmanager
def float32_newton_schulz() -> Iterator[None]:
    exact = partial(lorapre.linalg.newton_schulz, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lorapre.optimizers, "newton_schulz", exact)
        yield


# Gradients given, every layout


class Run:
    """An optimizer of `SHAPES`, and of `SMALL` in a group of its own, spread over `mesh` or not."""

    def __init__(self, name: str, place: Callable[[Tensor], Tensor], **options: Any) -> None:
        self.place = place
        self.params = [nn.Parameter(place(p)) for p in parameters(SHAPES + SMALL)]
        groups = [{"params": self.params[: len(SHAPES)]}, {"params": self.params[len(SHAPES) :], "rank": 1}]
        self.optimizer = CASES[name].make(groups, **options)

    def step(self, number: int, *, poison: int | None = None) -> None:
        for i, p in enumerate(self.params):
            g = gradient(p.shape, number, i)
            if i == poison:
                g.view(-1)[-1] = torch.nan
            p.grad = self.place(g)
        self.optimizer.step()


def check_layouts(names: list[str], layouts: list[str], tolerance: float, exact: bool = True) -> None:
    meshes: dict[tuple[int, ...], DeviceMesh] = {}
    for name in names:
        one = Run(name, torch.clone)
        many = []
        for layout in layouts:
            sizes, placements = LAYOUTS[layout]
            mesh = meshes.setdefault(sizes, init_device_mesh("cpu", sizes))
            many.append(Run(name, partial(spread, mesh=mesh, placements=placements)))
        with float32_newton_schulz() if exact else pytest.MonkeyPatch.context():
            for number in range(STEPS):
                for case in [one, *many]:
                    case.step(number)
        for layout, case in zip(layouts, many, strict=True):
            try:
                assert_relative(case.params, one.params, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{name}, {layout}: {error}") from None


def by_size(layouts: Iterable[str]) -> dict[int, list[str]]:
    """Number of processes -> layouts for it."""
    sizes: dict[int, list[str]] = {}
    for layout in layouts:
        sizes.setdefault(math.prod(LAYOUTS[layout][0]), []).append(layout)
    return sizes


@pytest.mark.parametrize("world", [2, 3, 4])
def test_steps_in_every_layout_are_those_of_one_process(world: int) -> None:
    run(check_layouts, world, [*VARIANTS, "adam-rank-0", "adam-dense"], by_size(LAYOUTS)[world], 1e-5)


@pytest.mark.parametrize("world", [3, 4])
def test_muon_is_that_of_one_process_with_a_float32_newton_schulz(world: int) -> None:
    run(check_layouts, world, [*MUON, "muon-rank-0"], by_size(FEW)[world], 1e-5)


def check_momentum_in_bfloat16() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    for name in ("adam-split", "muon-subspace"):
        runs = [
            Run(name, place, momentum_dtype="bfloat16")
            for place in (torch.clone, partial(spread, mesh=mesh, placements=(S0, S1)))
        ]
        with float32_newton_schulz():
            for number in range(STEPS):
                for each in runs:
                    each.step(number)
        one, many = runs
        assert_relative(many.params, one.params, 1e-3)
        for p, q in zip(one.params[:4], many.params[:4], strict=True):  # those with factors
            own, shards = one.optimizer.state[p], many.optimizer.state[q]
            assert isinstance(shards["m_B"], DTensor)
            assert shards["m_B"].dtype == shards["m_A"].dtype == torch.bfloat16
            products = [full(x["m_B"]).float() @ full(x["m_A"]).float() for x in (shards, own)]
            # Where a sum has another order, a factor may be rounded to its other neighbour.
            assert_relative(products[:1], products[1:], 2**-7)


def test_a_momentum_in_bfloat16_is_that_of_one_process() -> None:
    run(check_momentum_in_bfloat16, 4)


def test_muon_is_that_of_one_process_but_for_the_rounding_of_newton_schulz() -> None:
    run(check_layouts, 2, ["muon-subspace"], ["rows-2"], 1e-2, False)


def check_many_alike() -> None:
    # More of one shape than processes, which are dealt out unevenly, and fewer.
    mesh = init_device_mesh("cpu", (3,))
    shapes = [(12, 20)] * 5 + [(8, 30)]
    one, many = parameters(shapes), [nn.Parameter(spread(p, mesh, [S0])) for p in parameters(shapes)]
    counts: list[int] = []
    newton_schulz = partial(lorapre.linalg.newton_schulz, dtype=torch.float32)

    def counted(M: Tensor, *args: Any) -> Tensor:
        counts.append(M.shape[0])
        return newton_schulz(M, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lorapre.optimizers, "newton_schulz", counted)
        optimizers = CASES["muon-subspace"].make(one), CASES["muon-subspace"].make(many)
        for number in range(3):
            for params, optimizer in zip((one, many), optimizers, strict=True):
                for i, p in enumerate(params):
                    g = gradient(p.shape, number, i)
                    p.grad = spread(g, mesh, [S0]) if params is many else g
                counts.clear()
                optimizer.step()
                if params is many:
                    assert sorted(counts) in ([0, 2], [0, 1], [1, 2])
                    total = torch.tensor(sum(counts))
                    dist.all_reduce(total)
                    assert total == len(shapes)
        assert_relative(many, one, 1e-5)


def test_every_process_orthogonalises_its_share_of_the_matrices() -> None:
    run(check_many_alike, 3)


def check_skip() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for layout in ([S0], [S1]):
        one = Run("adam-split", torch.clone, nonfinite="skip")
        many = Run("adam-split", partial(spread, mesh=mesh, placements=layout), nonfinite="skip")
        for number in range(3):
            for case in (one, many):  # the last element lies on one process
                case.step(number, poison=number if number < 2 else SHAPES.index((3, 10, 14)))
        assert_relative(many.params, one.params, 1e-5)
        for p, q in zip(many.params, one.params, strict=True):
            for name in ("step", "skipped"):
                assert many.optimizer.state[p][name] == one.optimizer.state[q][name]
        assert [int(one.optimizer.state[p]["skipped"]) for p in one.params[:3]] == [1, 1, 1]


def test_a_nan_on_one_process_is_skipped_on_all() -> None:
    run(check_skip, 2)


def check_starts() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = [(13, 21), (21, 13), (13, 21)]
    for name in (*VARIANTS, "muon-subspace"):
        one = parameters(shapes)
        torch.manual_seed(dist.get_rank())  # plays no part
        for layout in ([S0], [S1]):
            many = [nn.Parameter(spread(p, mesh, layout)) for p in one]
            here, there = CASES[name].make(one), CASES[name].make(many[::-1])
            for i, (p, q) in enumerate(zip(one, many, strict=True)):
                p.grad = gradient(p.shape, 0, i)
                q.grad = spread(p.grad, mesh, layout)
            here.step()
            there.step()
            for p, q in zip(one, many, strict=True):
                assert_relative([there.state[q]["m_A"]], [here.state[p]["m_A"]], 1e-5)


@pytest.mark.parametrize("world", [2, 3])
def test_starts_depend_neither_on_the_sharding_nor_on_the_order_of_the_parameters(world: int) -> None:
    run(check_starts, world)


# Models


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 26)
        self.down = nn.Linear(26, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(n, s, 16) -> (n, s, 16)."""
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.block = Block()
        self.conv = nn.Conv1d(16, 18, 3)
        self.experts = nn.Parameter(torch.randn(3, 18, 20) / 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (n, s) -> loss, large enough for gradients of about one."""
        x = torch.tanh(self.conv(self.block(self.embed(tokens)).mT)).mT
        return 1000 * torch.tanh(torch.einsum("nsi,eij->nesj", x, self.experts)).square().mean()


def tokens(number: int) -> Tensor:
    return torch.randint(11, (12, 7), generator=torch.Generator().manual_seed(number))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(1)
    return Net().to(dtype)


def make(model: nn.Module, name: str, **options: Any) -> LoRAPreAdamW | LoRAPreMuon:
    named = list(model.named_parameters())
    convolution = [item for item in named if "conv" in item[0]]
    groups = [
        {"params": [item for item in named if "conv" not in item[0]]},
        {"params": convolution, "flatten": True},
    ]
    # eps keeps Adam from taking the rounding of a gradient near zero for its sign.
    eps = {} if name.startswith("muon") else {"eps": 1e-2}
    return CASES[name].make(groups, **{"lr": 0.003, **eps, **options})


def shard_fsdp(model: Net) -> Net:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.block, model):
        fully_shard(module, mesh=mesh)
    return model


def shard_columns(model: Net) -> Net:
    def placement(p: nn.Parameter) -> Shard | None:
        return Shard(1) if p.ndim > 1 and p.shape[1] % 2 == 0 else None  # FSDP2 wants an even split there

    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=placement)
    return model


def shard_hsdp(model: Net) -> Net:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for module in (model.block, model):
        fully_shard(module, mesh=mesh)
    return model


def parallelize(model: Net, mesh: DeviceMesh) -> Net:
    parallelize_module(model, mesh, {"block.up": ColwiseParallel(), "block.down": RowwiseParallel()})
    return model


def shard_tensor_parallel(model: Net) -> Net:
    return parallelize(model, init_device_mesh("cpu", (2,)))


def shard_both(model: Net) -> Net:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize(model, mesh["tensor"])
    for module in (model.block, model):
        fully_shard(module, mesh=mesh["data"])
    kinds = {type(p).__name__ for w in (model.block.up.weight, model.block.down.weight) for p in w.placements}
    assert "_StridedShard" in kinds
    return model


def check_model(shard: Callable[[Net], Net], data_parallel: bool, names: list[str]) -> None:
    for name in names:
        with float32_newton_schulz():
            one, many = net(), shard(net())
            optimizers = make(one, name), make(many, name)
            for number in range(STEPS):
                batch = tokens(number)
                n, rank = dist.get_world_size(), dist.get_rank()
                mine = batch.chunk(n)[rank] if data_parallel else batch
                for model, optimizer, x in zip((one, many), optimizers, (batch, mine), strict=True):
                    model(x).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        try:
            assert_relative(many.parameters(), one.parameters(), 1e-5)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        state = optimizers[1].state
        for p, q in zip(many.parameters(), one.parameters(), strict=True):
            for key, value in optimizers[0].state[q].items():
                assert state[p][key].shape == value.shape
                assert isinstance(state[p][key], DTensor) == (isinstance(p, DTensor) and value.ndim > 0)


MODELS = {
    "fsdp-2": (shard_fsdp, 2, True),
    "fsdp-3": (shard_fsdp, 3, True),
    "fsdp-columns": (shard_columns, 2, True),
    "hsdp": (shard_hsdp, 4, True),
    "tensor-parallel": (shard_tensor_parallel, 2, False),  # the rest are plain tensors, in one optimizer
    "fsdp-and-tensor-parallel": (shard_both, 4, False),
    "ddp": (DistributedDataParallel, 2, True),  # needs nothing
}


def need_uneven_strided_shards() -> None:
    if Version(torch.__version__) < Version("2.10"):
        pytest.skip("DTensor.full_tensor of torch 2.9 is wrong for uneven shards of both FSDP2 and TP")


@pytest.mark.parametrize("layout", MODELS)
def test_models_train_as_in_one_process(layout: str) -> None:
    shard, world, data_parallel = MODELS[layout]
    if shard is shard_both:
        need_uneven_strided_shards()
    run(check_model, world, shard, data_parallel, [*VARIANTS, "muon-subspace"])


def check_partial() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for placement in (S0, S1, R):
        one = parameters([(12, 20)])
        many = [nn.Parameter(spread(p, mesh, [placement])) for p in one]
        optimizers = CASES["adam-split"].make(one), CASES["adam-split"].make(many)
        for number in range(3):
            one[0].grad = gradient(one[0].shape, number, 0)
            share = one[0].grad * (0.25 if dist.get_rank() else 0.75)
            grad = DTensor.from_local(share, mesh, [Partial()])
            if placement == R or number == 1:  # set as autograd sets it, past the check of the setter
                many[0].grad = grad
            else:
                many[0].grad = grad.redistribute(placements=[R])
            for optimizer in optimizers:
                optimizer.step()
        assert_relative(many, one, 1e-5)


def test_gradients_that_are_still_to_be_summed_or_placed_elsewhere() -> None:
    run(check_partial, 2)


# Traffic


class Traffic(TorchDispatchMode):
    """Collectives of this process, as (operation, elements handed over)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, operation = func._schema.name.partition("::")
        if "c10d" in space:
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            self.calls.append((operation.strip("_"), first.numel()))
        return func(*args, **(kwargs or {}))

    def elements(self) -> int:
        return sum(elements for _, elements in self.calls)

    def operations(self) -> set[str]:
        return {operation for operation, _ in self.calls}


def traffic(name: str, placements: list[Placement], shape: tuple[int, ...], count: int, rank: int) -> Traffic:
    """Of the second step of `count` weights of a shape."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(spread(p, mesh, placements)) for p in parameters([shape] * count)]
    optimizer = CASES[name].make(params, rank=rank)
    for number in range(2):
        for i, p in enumerate(params):
            p.grad = spread(gradient(p.shape, number, i), mesh, placements)
        with Traffic() as counted:
            optimizer.step()
    return counted


def check_traffic() -> None:
    (p, q), r = (120, 200), 8
    for name in VARIANTS:
        for placement, side in ((S0, q), (S1, p)):
            counted = traffic(name, [placement], (p, q), 3, r)
            moments = 1 if name == "adam-split" else 2
            # The means of the second moment; else norms. And the four numbers of `stats`.
            vectors = (p + q + 1 + 2 if name == "adam-split" else 2 * 2) + 4
            assert counted.operations() == {"allreduce"}
            assert counted.elements() / 3 <= moments * (r * side + 5 * r * r) + vectors, (name, placement)
            assert counted.elements() / 3 >= moments * r * side  # it does count
            # Both moments and all weights of a shape share each collective.
            assert len(counted.calls) <= 14
            for many in (1, 9):
                assert len(traffic(name, [placement], (p, q), many, r).calls) == len(counted.calls)
    # What is only replicated, or dense, needs none.
    assert not traffic("adam-split", [R], (p, q), 3, r).calls
    assert not traffic("adam-dense", [S0], (p, q), 3, None).calls  # type: ignore[arg-type]
    # Experts are whole where they are sharded over experts: the numbers of `stats` alone travel.
    assert traffic("adam-split", [S0], (4, 20, 30), 2, r).elements() == 2 * 4


def test_adam_sums_small_matrices_only_and_gathers_nothing() -> None:
    run(check_traffic, 2)


def check_muon_traffic() -> None:
    (p, q), r, n = (120, 200), 8, 2
    for name in MUON:
        for placement, side in ((S0, q), (S1, p)):
            counted = traffic(name, [placement], (p, q), 4, r)
            dealt = [elements for operation, elements in counted.calls if "alltoall" in operation]
            summed = [elements for operation, elements in counted.calls if operation == "allreduce"]
            assert len(dealt) + len(summed) == len(counted.calls)
            assert dealt == [4 * p * q // n] * 2  # a share of the matrices out, and back
            assert sum(summed) / 4 <= r * side + 3 * r * r + p + q


def test_muon_deals_matrices_out_and_back_and_gathers_nothing() -> None:
    run(check_muon_traffic, 2)


def check_bytes() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    n = dist.get_world_size()
    for name in (*VARIANTS, "muon-subspace", "adam-dense"):
        for placement in (S0, S1):
            shapes = [(48, 60), (13, 21), (4, 20, 30)]
            params = [nn.Parameter(spread(p, mesh, [placement])) for p in parameters(shapes)]
            optimizer = CASES[name].make(params)
            planned = coverage(optimizer)
            for i, p in enumerate(params):
                p.grad = spread(gradient(p.shape, 0, i), mesh, [placement])
            optimizer.step()
            for before, after in zip(planned, coverage(optimizer), strict=True):
                assert before.planned_bytes == after.planned_bytes == after.state_bytes
            for key, value in optimizer.state[params[0]].items():
                if key == "step":
                    continue
                spread_too = ("_B", "row", "avg", "sq") if placement == S0 else ("_A", "col", "avg", "sq")
                shrinks = key.endswith(spread_too)
                local = value.to_local()
                assert local.numel() == (value.numel() // n if shrinks else value.numel()), (key, placement)
                assert local.untyped_storage().nbytes() == 4 * local.numel()


@pytest.mark.parametrize("world", [2, 4])
def test_the_share_of_the_state_shrinks_with_the_number_of_processes_and_coverage_says_so(world: int) -> None:
    run(check_bytes, world)


# Checkpoints

SAVED = ["adam-split", "muon-subspace"]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, steps: int) -> None:
    """Along gradients that do not depend on the weights."""
    for number in range(start, start + steps):
        for i, (_, p) in enumerate(sorted(model.named_parameters())):
            g = gradient(p.shape, number, i).to(p.dtype)
            if isinstance(p, DTensor):
                g = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = g
        optimizer.step()
    optimizer.zero_grad()


def fulls(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and state by name, whole."""
    found = {}
    for name, p in model.named_parameters():
        held = {"weight": p, **optimizer.state[p]}
        found[name] = {key: full(value).clone() for key, value in held.items()}
    return found


def place_model(kind: str, name: str = "") -> Net:
    model = net(torch.float32 if name == "muon-subspace" else torch.bfloat16)
    return {"plain": lambda m: m, "fsdp": shard_fsdp, "both": shard_both, "hsdp": shard_hsdp}[kind](model)


FORMATS = {"nested": {}, "flat": {"flatten_optimizer_state_dict": True}}


def check_saving(folder: Path, kind: str) -> None:
    with float32_newton_schulz():
        for name in SAVED:
            model = place_model(kind, name)
            optimizer = make(model, name)
            train(model, optimizer, 0, 3)
            for form, options in FORMATS.items():
                state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))
                dcp.save(
                    {"model": model.state_dict(), "optimizer": state}, checkpoint_id=folder / name / form
                )
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_optimizer_state_dict(model, optimizer, options=whole)
            if dist.get_rank() == 0:
                torch.save(state, folder / name / "whole.pt")
            saved = fulls(model, optimizer)
            train(model, optimizer, 3, 2)
            later = fulls(model, optimizer)
            if dist.get_rank() == 0:
                torch.save((saved, later), folder / name / "expected.pt")


def check_loading(folder: Path, kind: str) -> None:
    with float32_newton_schulz():
        for name in SAVED:
            saved, later = torch.load(folder / name / "expected.pt", weights_only=True)
            for form in (*FORMATS, "whole", "broadcast"):
                if kind == "both" and form not in FORMATS:
                    continue  # torch scatters no uneven strided shard, be it state or weight
                model = place_model(kind, name)
                optimizer = make(model, name)
                with torch.no_grad():
                    for p in model.parameters():
                        p.zero_()
                if form in FORMATS:
                    options = StateDictOptions(**FORMATS[form])
                    state = {
                        "model": model.state_dict(),
                        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
                    }
                    dcp.load(state, checkpoint_id=folder / name / form)
                    model.load_state_dict(state["model"])
                    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
                else:
                    alone = form == "broadcast"
                    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=alone)
                    state = {}
                    if dist.get_rank() == 0 or not alone:
                        state = torch.load(folder / name / "whole.pt", weights_only=True)
                    set_optimizer_state_dict(model, optimizer, state, options=options)
                    with torch.no_grad():
                        for key, p in model.named_parameters():
                            value = saved[key]["weight"]
                            sharded = isinstance(p, DTensor)
                            p.copy_(
                                distribute_tensor(value, p.device_mesh, p.placements) if sharded else value
                            )
                assert_same(fulls(model, optimizer), saved)
                for p in model.parameters():
                    for key, value in optimizer.state[p].items():
                        assert value.dtype == torch.float32, key
                        assert isinstance(value, DTensor) == (isinstance(p, DTensor) and value.ndim > 0), key
                train(model, optimizer, 3, 2)
                for key, values in fulls(model, optimizer).items():
                    for what, value in values.items():
                        # In bfloat16 the order of the sums decides some roundings of the weights.
                        rounded = 1e-3 if value.dtype == torch.bfloat16 else 1e-6
                        assert_relative([value], [later[key][what]], rounded if what == "weight" else 1e-5)
                    if kind == "fsdp" and dist.get_world_size() == 2:
                        assert_same(values, later[key])


def test_checkpoints_load_exactly_on_any_number_of_processes(tmp_path: Path) -> None:
    run(check_saving, 2, tmp_path, "fsdp")
    for world in (2, 3, 1):
        run(check_loading, world, tmp_path, "fsdp")
    run(check_loading, 1, tmp_path, "plain")


def test_checkpoints_of_a_mesh_load_on_others(tmp_path: Path) -> None:
    need_uneven_strided_shards()
    run(check_saving, 4, tmp_path, "both")
    run(check_loading, 4, tmp_path, "both")
    run(check_loading, 4, tmp_path, "hsdp")
    run(check_loading, 1, tmp_path, "plain")


def check_plain_state_dict() -> None:
    # optimizer.load_state_dict itself, given whole tensors or other placements.
    mesh = init_device_mesh("cpu", (2,))
    shapes = [(13, 21), (3, 10, 14), (7,)]
    for name in ("adam-split", "muon-subspace"):
        one = parameters(shapes)
        first = CASES[name].make(one)
        for i, p in enumerate(one):
            p.grad = gradient(p.shape, 0, i)
        first.step()
        saved = first.state_dict()
        rows = [nn.Parameter(spread(p, mesh, [S0])) for p in one]
        columns = [nn.Parameter(spread(p, mesh, [S1])) for p in one]
        plain = [nn.Parameter(p.detach().clone()) for p in one]
        for params in (rows, columns, plain):  # whole -> rows -> columns -> whole
            optimizer = CASES[name].make(params)
            optimizer.load_state_dict(saved)
            saved = optimizer.state_dict()
            for p, q in zip(params, one, strict=True):
                for key, value in optimizer.state[p].items():
                    assert_same(full(value), first.state[q][key])
                    assert isinstance(value, DTensor) == (isinstance(p, DTensor) and value.ndim > 0)


def test_state_dicts_of_whole_or_otherwise_placed_tensors_are_placed() -> None:
    run(check_plain_state_dict, 2)


def check_initialisation() -> None:
    for name in (*VARIANTS, "muon-subspace"):
        for kind in ("plain", "fsdp"):
            model = place_model(kind)
            optimizer = make(model, name)
            before = [full(p) for p in model.parameters()]
            get_optimizer_state_dict(model, optimizer)  # steps along zeros at a learning rate of zero
            assert_same([full(p) for p in model.parameters()], before)
            other = place_model(kind)
            stepped = make(other, name)
            train(other, stepped, 0, 1)
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                found, wanted = optimizer.state[p], stepped.state[q]
                assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}


def test_a_step_along_zeros_allocates_and_changes_nothing() -> None:
    run(check_initialisation, 2)


# Refusals


def check_refusals() -> None:
    for original in (False, True):
        model = FullyShardedDataParallel(
            nn.Linear(8, 6), use_orig_params=original, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match=r"parameter '.*' is a flat piece of FSDP1.*fully_shard"):
            LoRAPreAdamW(model.named_parameters(), rank=2)
    mesh = init_device_mesh("cpu", (2,))
    share = DTensor.from_local(torch.zeros(12, 20), mesh, [Partial()])
    pixels = distribute_tensor(torch.zeros(8, 4, 2, 2), mesh, [Shard(2)])
    uneven = distribute_tensor(torch.zeros(8, 3, 2, 2), mesh, [Shard(1)])
    for weight, message in (
        (share, "Partial.*replicated or sharded"),
        (pixels, "convolution placed as Shard.*2.*outputs or its inputs"),
        (uneven, "convolution with 3 inputs on 2 processes"),
    ):
        with pytest.raises(ValueError, match=f"parameter 'w' is .*{message}"):
            LoRAPreMuon([("w", weight)], rank=2)
    # Placed so after construction: refused before anything changes.
    first, second = parameters([(12, 20), (12, 20)])
    optimizer = LoRAPreAdamW([("a", first), ("b", second)], rank=2)
    for p in (first, second):
        p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["params"][1] = share
    before = first.detach().clone()
    with pytest.raises(RuntimeError, match="parameter 'b' is placed as Partial"):
        optimizer.step()
    assert_same(first.detach(), before)
    assert not optimizer.state


def test_what_cannot_be_right_is_refused() -> None:
    run(check_refusals, 2)


@pytest.mark.parametrize("attribute", ["ds_id", "ds_tensor", "_hp_mapping"])
def test_weights_partitioned_by_deepspeed_are_refused(attribute: str) -> None:
    weight = nn.Parameter(torch.zeros(0))
    setattr(weight, attribute, 0)
    with pytest.raises(ValueError, match=r"parameter 'w' is partitioned by DeepSpeed ZeRO.*fully_shard"):
        LoRAPreAdamW([("w", weight)])
    weight = nn.Parameter(torch.ones(12, 20))
    optimizer = LoRAPreAdamW([("w", weight)], rank=2)
    setattr(weight, attribute, 0)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match=r"parameter 'w' is partitioned by DeepSpeed ZeRO.*fully_shard"):
        optimizer.step()
    assert_same(weight.detach(), torch.ones(12, 20))


def test_matrices_replaced_by_a_flat_vector_are_refused() -> None:
    # ZeRO 1 and 2: the optimizer is built with the model's weights, then handed one vector per group.
    params = parameters([(12, 20), (5,)])
    optimizer = LoRAPreAdamW(params, rank=2)
    flat = nn.Parameter(torch.ones(245))
    flat.grad = torch.ones(245)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"matrices of a group .* flat vectors.*fully_shard"):
        optimizer.step()
    assert_same(flat.detach(), torch.ones(245))
    dense = LoRAPreAdamW(parameters([(5,), (7,)]))  # vectors from the start are what they were meant to be
    dense.param_groups[0]["params"][0].grad = torch.ones(5)
    dense.step()


@pytest.mark.parametrize("name", [*VARIANTS, "muon-subspace"])
def test_an_optimizer_that_the_checkpoint_apis_initialised_trains_from_scratch(name: str) -> None:
    # They leave a step behind and no start from a gradient; torch.optim.AdamW's first steps are shorter then.
    losses: dict[bool, list[float]] = {False: [], True: []}
    for initialised in (False, True):
        model = net()
        optimizer = make(model, name)
        if initialised:
            get_optimizer_state_dict(model, optimizer)
        for number in range(30):
            before = [p.detach().clone() for p in model.parameters()]
            loss = model(tokens(0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == 0 and name in VARIANTS:
                # All that "split" cannot average takes effect at once: up to 3.3 lr in its second step.
                bound = 3.4 if name == "adam-split" and initialised else 1.01
                for p, q in zip(model.parameters(), before, strict=True):
                    assert (p - q).abs().max() <= bound * 0.003 + 1.01 * 0.003 * 0.1 * q.abs().max()
            losses[initialised].append(loss.item())
    assert losses[True][-1] <= losses[False][-4], "more than three steps behind"


def check_failure() -> None:
    if dist.get_rank() == 1:
        raise ArithmeticError("this process gives up")
    dist.barrier()  # waits for it


def test_a_process_that_fails_ends_the_others_and_shows_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)in check_failure.*ArithmeticError: this process gives up"):
        run(check_failure, 2)
