"""What the benchmarks share: weights, the optimizers that are compared, timing, results to print and keep."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch loads: its profiler talks on stderr

import contextlib
import dataclasses
import gc
import importlib
import inspect
import json
import logging
import math
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from lorapre import LoRAPreAdamW, LoRAPreMuon, param_groups
from lorapre.groups import is_low_rank
from lorapre_recipes.train.optim import WithAdamW

logging.disable(logging.ERROR)  # transformers imports torchao, which logs what a machine without GPU lacks
from lorapre_recipes.plan.shapes import meta_model  # noqa: E402

logging.disable(logging.NOTSET)

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR = 1e-4
GAP = 200  # steps between two projections of GaLore, Fira and APOLLO, as their papers have it
NO_GPU = "not measured"

Ranks = Annotated[list[int], Parameter(consume_multiple=True)]


# Weights

Shapes = list[tuple[int, int]]


def shapes_of(model: str, layers: int | None = None) -> Shapes:
    """The matrices that LoRA-Pre factorises in a model, or the one that is written as 2048x5504.

    Args:
        model: what `lorapre plan` takes, or ROWSxCOLUMNS.
        layers: only the first ones, for a machine that does not hold the state of all optimizers.
    """
    if written := re.fullmatch(r"(\d+)x(\d+)", model):
        return [(int(written[1]), int(written[2]))]
    named = matrices_of(meta_model(model, torch.float32))
    blocks = {name: re.search(r"\.(\d+)\.", name) for name, _ in named}
    return [
        (p.shape[0], p.shape[1])
        for name, p in named
        if layers is None or ((block := blocks[name]) and int(block[1]) < layers)
    ]


def matrices_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of what `lorapre.param_groups` calls a matrix."""
    return [pair for group in param_groups(model, rank=1) if group["rank"] for pair in group["params"]]


def make_weights(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
    """Random weights with random gradients, of the sizes that training has."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, int], std: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    weights = [nn.Parameter(normal(shape, 0.02)) for shape in shapes]
    for weight in weights:
        weight.grad = normal(tuple(weight.shape), 1e-3)
    return weights


# Optimizers


class NotMeasured(Exception):
    """Why there is no figure, in a few words."""


Weights = list[nn.Parameter]
Build = Callable[[Weights, Weights], Optimizer]  # of matrices, and of all else


class Contender(NamedTuple):
    """An optimizer in a comparison; `build` raises NotMeasured or ImportError where it cannot run."""

    name: str
    rank: int | None
    build: Build
    gap: int = 0  # steps between two refreshes that cost more than a step, 0 for none
    release: bool = False  # of gradients, in the backward pass


def contenders(ranks: Sequence[int], dtype: torch.dtype) -> Iterator[Contender]:
    """All of them: torch's, those of packages, and LoRA-Pre."""
    yield Contender("AdamW (foreach)", None, lambda m, r: AdamW([*r, *m], lr=LR, foreach=True))
    yield Contender("AdamW (fused)", None, lambda m, r: AdamW([*r, *m], lr=LR, fused=True))
    yield Contender("Muon", None, muon)
    yield Contender("AdamW8bit (torchao)", None, adamw_8bit)
    for rank in ranks:
        for name in ("GaLore", "Fira", "APOLLO"):
            yield Contender(name, rank, projected("pytorch_optimizer", name, rank), GAP)
    yield Contender("MLorc", ranks[0], mlorc(ranks[0]))
    yield Contender("MoFaSGD", None, mofasgd)
    for rank in ranks:
        for variant in ("split", "paper"):
            yield Contender(f"LoRA-Pre, {variant}", rank, lorapre_adamw(rank, variant=variant))
        if dtype == torch.bfloat16:
            build = lorapre_adamw(rank, stochastic_rounding=True)
            yield Contender("LoRA-Pre, rounding", rank, build)
        yield Contender("LoRA-Pre Muon", rank, lorapre_muon(rank))


def lorapre_adamw(rank: int, **options: Any) -> Build:
    def build(matrices: Weights, rest: Weights) -> Optimizer:
        for name in options:
            if name not in inspect.signature(LoRAPreAdamW).parameters:
                raise NotMeasured(f"no option {name} in this version")
        check_rank(matrices, rank)
        return LoRAPreAdamW(grouped(matrices, rest, {"rank": rank}, {"rank": None}), lr=LR, **options)

    return build


def lorapre_muon(rank: int) -> Build:
    def build(matrices: Weights, rest: Weights) -> Optimizer:
        check_rank(matrices, rank)
        return LoRAPreMuon(grouped(matrices, rest, {"rank": rank}, {"rank": None}), lr=LR)

    return build


def check_rank(matrices: Weights, rank: int) -> None:
    """A matrix that goes dense would be timed as what it is not."""
    dense = sum(not is_low_rank(tuple(p.shape), rank, False) for p in matrices)
    if dense:
        raise NotMeasured(f"factors not smaller for {dense} of {len(matrices)} matrices")


def muon(matrices: Weights, rest: Weights) -> Optimizer:
    if rest:
        return WithAdamW(Muon(matrices, lr=LR, weight_decay=0.0), AdamW(rest, lr=LR, weight_decay=0.0))
    return Muon(matrices, lr=LR)


def adamw_8bit(matrices: Weights, rest: Weights) -> Optimizer:
    return load("torchao.optim", "AdamW8bit", "torchao")([*rest, *matrices], lr=LR)


def projected(module: str, name: str, rank: int) -> Build:
    def build(matrices: Weights, rest: Weights) -> Optimizer:
        options = {"rank": rank, "update_proj_gap": GAP, "scale": 0.25, "projection_type": "std"}
        make = load(module, name, "pytorch_optimizer")
        return make(grouped(matrices, rest, options, {}), lr=LR)

    return build


def galore_8bit(rank: int) -> Build:
    def build(matrices: Weights, rest: Weights) -> Optimizer:
        options = {"rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
        make = load("galore_torch", "GaLoreAdamW8bit", "galore-torch and bitsandbytes")
        return make(grouped(matrices, rest, options, {}), lr=LR)

    return build


def mlorc(rank: int) -> Build:
    def build(matrices: Weights, rest: Weights) -> Optimizer:
        make = load("MLorc_optim", "MLorc_AdamW", "mlorc-optim")
        return make([*rest, *matrices], lr=LR, rank=rank)

    return build


def mofasgd(matrices: Weights, rest: Weights) -> Optimizer:
    raise NotMeasured("no package")


def grouped(
    matrices: Weights, rest: Weights, options: dict[str, Any], others: dict[str, Any]
) -> list[dict[str, Any]]:
    groups = [{"params": rest, **others}, {"params": matrices, **options}]
    return [group for group in groups if group["params"]]


def load(module: str, name: str, package: str) -> Any:
    """A class of a package. Raises NotMeasured where that is not there or does not import."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            raise NotMeasured(f"{package} not installed") from error
        raise NotMeasured(f"{package} lacks {error.name}") from error


def reason(error: Exception) -> str:
    """Why an optimizer has no figure, in a few words and one line."""
    if isinstance(error, NotMeasured):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}"[:60]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Peers warn and log what is theirs; here a row says what did not work."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# Timing


def device_of(name: str) -> torch.device:
    """The device. Raises NotMeasured where there is none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise NotMeasured(NO_GPU)
    return device


def seconds(fn: Callable[[], Any], device: torch.device) -> float:
    """How long fn takes, work on the device included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    fn()
    wait()
    return time.perf_counter() - start


def interleaved(
    steps: dict[Any, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[Any, list[float]]:
    """Seconds of each, in rounds that go through all of them, so that a slow minute slows them all.

    Each round starts with another one.
    """
    times: dict[Any, list[float]] = {key: [] for key in steps}
    keys = list(steps)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % max(1, len(keys))
            for key in keys[first:] + keys[:first]:
                times[key].append(seconds(steps[key], device))
    finally:
        gc.enable()
    return times


def spread(times: Sequence[float]) -> float:
    """Half of the times lie within so much of the median: the interquartile range over the median."""
    if len(times) < 2:
        return math.nan
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle


class SVD:
    """torch.linalg.svd for GaLore and Fira, once for each shape, timed.

    They decompose the gradient of every weight every GAP steps, which takes as long as hundreds of steps:
    here it is done once for each shape, and counted for each weight.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cost: dict[tuple[int, ...], float] = {}
        self._results: dict[tuple[int, ...], Any] = {}
        self._calls: Counter[tuple[int, ...]] = Counter()

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        original = torch.linalg.svd

        def svd(x: Tensor, *args: Any, **options: Any) -> Any:
            shape = tuple(x.shape)
            self._calls[shape] += 1
            if shape not in self._results:
                self.cost[shape] = seconds(
                    lambda: self._results.__setitem__(shape, original(x, *args, **options)), self.device
                )
            return self._results[shape]

        torch.linalg.svd = svd
        try:
            yield
        finally:
            torch.linalg.svd = original

    def refresh(self, optimizer: Optimizer) -> float:
        """Seconds of a step that computes all projections anew."""
        for group in optimizer.param_groups:
            group["step"] = 2 * GAP - 1
        self._calls.clear()
        with self.once():
            rest = seconds(optimizer.step, self.device)
        return rest + sum(self.cost[shape] * count for shape, count in self._calls.items())


# Results


class Column(NamedTuple):
    """A column of a table: the key of the rows, the header, and how numbers are written."""

    key: str
    header: str
    style: str = ""  # a format specification, or "MiB"

    def text(self, value: Any) -> str:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return ""
        if self.style == "MiB":
            return f"{value / 2**20:,.{1 if value < 100 * 2**20 else 0}f}"
        return format(value, self.style) if self.style else str(value)


Row = dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class Result:
    """What a benchmark measured: rows of figures, or of reasons, and all that is needed to measure again."""

    benchmark: str
    title: str
    device: str
    settings: dict[str, Any]
    columns: list[Column]
    rows: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)
    command: str = dataclasses.field(default_factory=lambda: command())
    environment: dict[str, Any] = dataclasses.field(default_factory=lambda: environment())

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text; a reason stands in the place of the first figure, a long one below."""
        texts = [[column.text(row.get(column.key)) for column in self.columns] for row in self.rows]
        for row, text in zip(self.rows, texts, strict=True):
            if why := row.get("reason"):
                keys = [column.key for column in self.columns]
                text[keys.index(self.figure)] = why if len(why) <= len(NO_GPU) else "no figure"
        return texts

    @property
    def figure(self) -> str:
        """The key of the first column of figures."""
        return next(column.key for column in self.columns if column.style)

    @property
    def below(self) -> list[str]:
        """Reasons that do not fit into the table, and the notes."""
        reasons = {}
        for row in self.rows:
            if len(why := row.get("reason") or "") > len(NO_GPU):
                rank = f", rank {row['rank']}" if row.get("rank") else ""
                reasons[f"{row[self.columns[0].key]}{rank}: {why}."] = None
        return [*reasons, *self.notes]

    def print(self) -> None:
        table = Table(
            title=self.title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 0, 0, 1),
        )
        for index, column in enumerate(self.columns):
            table.add_column(column.header, justify="right" if index else "left", no_wrap=True)
        for cells in self.cells:
            table.add_row(*cells)
        console = Console()
        console.print(table)
        for note in self.below:
            console.print(note, style="dim", highlight=False)

    def save(self, out: Path | None, draw: Callable[[Any, "Result"], None] | None = None) -> Path:
        """Print, write NAME.json and, where there is something to draw, NAME.png, and return the first."""
        self.print()
        folder = out or ROOT / "benchmarks" / "results" / label(self.environment)
        folder.mkdir(parents=True, exist_ok=True)
        parts = [Path(part).name for part in self.settings["name"]]  # a model may be a folder
        name = "-".join([self.benchmark, *parts, self.device])
        file = folder / f"{name}.json"
        fields = dataclasses.asdict(self) | {"columns": [list(column) for column in self.columns]}
        file.write_text(json.dumps(finite(fields), indent=1) + "\n", encoding="utf-8")
        picture = file.with_suffix(".png")
        picture.unlink(missing_ok=True)
        if draw and any(not row.get("reason") for row in self.rows):
            from matplotlib.figure import Figure  # without pyplot: no display, no global state

            figure = Figure(figsize=(8, 4.8), layout="constrained")
            draw(figure, self)
            figure.savefig(picture, dpi=130)
        print(f"Written: {shown(file)}" + (f", {picture.name}" if picture.exists() else ""))
        return file

    @classmethod
    def load(cls, file: Path) -> "Result":
        fields = json.loads(file.read_text(encoding="utf-8"))
        fields["columns"] = [Column(*column) for column in fields["columns"]]
        return cls(**fields)

    def markdown(self) -> str:
        """The table for a report."""
        head = "| " + " | ".join(column.header for column in self.columns) + " |"
        rule = "|" + "|".join("---" if i == 0 else "---:" for i, _ in enumerate(self.columns)) + "|"
        body = ["| " + " | ".join(cells) + " |" for cells in self.cells]
        return "\n".join([head, rule, *body])


def finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(path: Path) -> str:
    """A path as seen from here."""
    return os.path.relpath(path)


def command() -> str:
    """What was typed."""
    script = Path(sys.argv[0])
    return shlex.join(["python", f"benchmarks/{script.name}", *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """Hardware, versions, commit and date."""
    names = ("torch", "transformers", "pytorch_optimizer", "torchao", "triton")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": driver(),
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: found for name in names if (found := version_of(name))},
    }


def driver() -> str | None:
    """The version of NVIDIA's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ran = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        return (ran.stdout.split() or [None])[0]
    return None


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    try:
        # The wheel's metadata of torch may lack the build: 2.13.0 for 2.13.0+cu130.
        return torch.__version__ if package == "torch" else version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit, and whether the sources differ from it."""

    def git(*arguments: str) -> str:
        ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + (", changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def label(facts: dict[str, Any]) -> str:
    """DATE_HARDWARE, the name of a report."""
    hardware = facts["gpu"] or f"{facts['cpu']} {facts['cores']} cores"
    return f"{facts['date']}_{re.sub('[^a-z0-9]+', '-', hardware.lower()).strip('-')}"
