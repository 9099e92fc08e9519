"""Route, rank and bytes of state of every parameter of an optimizer, and what its steps do."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorapre import sharding
from lorapre.gradient import state_dtype
from lorapre.groups import is_low_rank, state_shapes

__all__ = ["Coverage", "Row", "coverage"]

_WIDTH = 80
_NOT_SMALLER = "factors not smaller"
_INDEX = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.|$)")  # of a layer or an expert in a dotted name


@dataclass(frozen=True)
class Row:
    """One parameter of an optimizer; bytes are those of this process, where the weight is sharded.

    Attributes:
        name: name of the parameter, or "group.index" where the optimizer was not given names.
        shape: shape of the whole weight.
        route: "low-rank" or "dense".
        rank: rank of its factors; None on the dense route.
        state_bytes: state held now; 0 before the first step that has a gradient.
        planned_bytes: state held after that step; 0 for a frozen parameter.
        adamw_bytes: what `torch.optim.AdamW` would hold, two moments in the weight's dtype and a
            step; 0 for a frozen parameter.
        note: "factors not smaller" for a matrix that has a rank and is dense, "frozen", or empty.
        skipped: steps skipped for non-finite gradients; None where they are not counted.
        captured, update: as in `stats`, of this weight; None where they are not known.
    """

    name: str
    shape: tuple[int, ...]
    route: str
    rank: int | None
    state_bytes: int
    planned_bytes: int
    adamw_bytes: int
    note: str
    skipped: int | None
    captured: float | None = field(default=None, compare=False)
    update: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Coverage:
    """Rows of `coverage`; `str()` is a table of at most 80 columns. Layers alike share a line."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def state_bytes(self) -> int:
        """Bytes of state held now."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def planned_bytes(self) -> int:
        """Bytes of state once every trainable parameter has had a gradient."""
        return sum(row.planned_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """Bytes that `torch.optim.AdamW` would hold for the same parameters."""
        return sum(row.adamw_bytes for row in self.rows)

    def __str__(self) -> str:
        column = "state_bytes" if self.state_bytes else "planned_bytes"
        total = getattr(self, column)
        alike: dict[tuple[object, ...], list[Row]] = {}  # a weight of all layers is one line
        for row in self.rows:
            kind = (_INDEX.sub("#", row.name), row.shape) if len(row.shape) > 1 else ()
            alike.setdefault((kind, row.rank, row.note), []).append(row)
        lines = [("parameter", "", "shape", "rank", column.removesuffix("_bytes"), "AdamW")]
        for rows in alike.values():
            state, adamw = sum(getattr(r, column) for r in rows), sum(r.adamw_bytes for r in rows)
            lines.append((*_described(rows), _bytes(state), _bytes(adamw)))
        lines.append(("total", f"x{len(self)}", "", "", _bytes(total), _bytes(self.adamw_bytes)))
        return "\n".join([*_table(lines), "", *self._remarks(total)])

    def _remarks(self, total: int) -> Iterator[str]:
        sizes = [math.prod(row.shape) for row in self.rows if row.route == "low-rank"]
        # Neither may be zero: all weights can be empty, or all frozen.
        share = sum(sizes) / max(1, sum(math.prod(row.shape) for row in self.rows))
        ratio = total / max(1, self.adamw_bytes)
        yield f"{len(sizes)} low-rank weights hold {share:.1%} of the parameters."
        yield f"State is {ratio:.1%} of AdamW's."
        waiting = [row for row in self.rows if row.planned_bytes and not row.state_bytes]
        if not self.state_bytes:
            yield "No state is held yet; the first step allocates the planned bytes."
        elif waiting:
            more = _bytes(sum(row.planned_bytes for row in waiting))
            yield f"{len(waiting)} parameters have had no gradient yet, and will add {more}."
        if any(row.note == _NOT_SMALLER for row in self.rows):
            yield "* dense although the group has a rank: the factors would not be smaller."
        if shares := [row.captured for row in self.rows if row.captured is not None]:
            yield f"Factors capture {min(shares):.0%} to {max(shares):.0%} of a gradient's energy."
        if skipped := max(row.skipped or 0 for row in self.rows):
            yield f"Steps skipped for non-finite gradients: at most {skipped} of one parameter."


def coverage(optimizer: torch.optim.Optimizer) -> Coverage:
    """Route, rank and bytes of state of every parameter, beside those of AdamW.

    Before the first step there is no state; `planned_bytes` is what that step will allocate. It is
    exact for `LoRAPreAdamW` and `LoRAPreMuon`. Any other optimizer is planned as if it were AdamW;
    its `state_bytes` are right.

    Reads what past steps have counted and so waits for the device: do not call it in every step.

    Args:
        optimizer: any torch optimizer.

    Returns:
        A `Coverage`: one `Row` for each parameter, the totals in bytes, and a table as its `str()`.
    """
    rows, inner = [], getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    recent = getattr(inner, "_recent", {})
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or ()
        if len(names) != len(group["params"]):  # there are none, or a parameter has been taken out
            names = [f"{number}.{index}" for index in range(len(group["params"]))]
        for name, p in zip(names, group["params"], strict=True):
            found = stats([recent[p]] if p in recent else [])
            rows.append(_row(name, p, group, optimizer.state.get(p, {}), found))
    return Coverage(tuple(rows))


def stats(sums: Sequence[Tensor]) -> dict[str, Tensor]:
    """What recent steps did to some weights, as scalars; `sums` are the averages of `Batch.note`.

    * `captured_min`, `captured_mean`: the share of the gradient's energy ||g||**2 that lies in the
      rows of A, where the momentum lives.
    * `update_max`, `update_mean`: sqrt(mean m**2 / mean v), about the RMS of the update in units of
      lr scale; of "split".

    The last step counts 5 %, each before it 5 % less. Empty before the first step; NaN
    where every gradient was zero or not finite.
    """
    result: dict[str, Tensor] = {}
    for name, extreme, first, power in (("captured", "min", 0, 1.0), ("update", "max", 2, 0.5)):
        pairs = [x[first : first + 2].to(sums[0].device) for x in sums if len(x) > first]
        if pairs:
            a, b = torch.stack(pairs, -1)
            x = (a / b) ** power
            x = torch.where(x.isnan(), x.nanmean(), x)
            result |= {f"{name}_{extreme}": getattr(x, f"a{extreme}")(), f"{name}_mean": x.mean()}
    return result


def _row(
    name: str, p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any],
    found: Mapping[str, Tensor],
) -> Row:  # fmt: skip
    rank, flatten = group.get("rank"), group.get("flatten", False)
    low_rank = is_low_rank(p.shape, rank, flatten)
    note = _NOT_SMALLER if rank is not None and p.ndim > 1 and not low_rank else ""
    if "step" in state and "algorithm" in group:  # options may have been edited since
        low_rank = "exp_avg" not in state
        rank = state["m_B"].shape[-1] if "m_B" in state else 0
    size = sharding.local(p.detach()).numel()
    planned = sum(
        math.prod(sharding.local_shape(p, flatten, key, whole))
        * state_dtype(group, p, key).itemsize
        for key, whole in state_shapes(group, p.shape).items()
    )
    tensors = [sharding.local(x.detach()) for x in state.values() if isinstance(x, Tensor)]
    known = {key: float(x) for key, x in found.items() if not x.isnan()}
    return Row(
        name=name,
        shape=tuple(p.shape),
        route="low-rank" if low_rank else "dense",
        rank=rank if low_rank else None,
        state_bytes=sum(x.numel() * x.element_size() for x in tensors),
        planned_bytes=planned if p.requires_grad else 0,
        adamw_bytes=2 * size * p.element_size() + 4 if p.requires_grad else 0,
        note=note if p.requires_grad else "frozen",
        skipped=int(state["skipped"]) if "skipped" in state else None,
        captured=known.get("captured_mean"),
        update=known.get("update_mean"),
    )


def _described(rows: Sequence[Row]) -> tuple[str, str, str, str]:
    """Name, count, shape and rank of a line of the table."""
    first = rows[0]
    if len(rows) > 1 and len(first.shape) < 2:
        name, shape = "vectors and scalars", ""
    else:  # h.0.weight and h.1.weight are h.0-1.weight
        parts = zip(*(_INDEX.split(row.name) for row in rows), strict=False)
        name = "".join(
            _ranges({int(number) for number in part}) if place % 2 else part[0]
            for place, part in enumerate(parts)
        )
        shape = "x".join(map(str, first.shape))
    rank = "dense" if first.rank is None else str(first.rank)
    rank = {"frozen": "frozen", _NOT_SMALLER: "dense*"}.get(first.note, rank)
    return name, f"x{len(rows)}" if len(rows) > 1 else "", shape, rank


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} as "0-2,5"; the first and the last number where that is longer."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return text if len(text) <= 8 else f"{min(numbers)}..{max(numbers)}"


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Header, body and total, aligned. Names are shortened where a line would be too wide."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[0] = min(widths[0], _WIDTH - sum(widths[1:]) - 2 * len(widths[1:]))
    text = []
    for name, *cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([_shorten(name, widths[0]).ljust(widths[0]), *aligned]))
    rule = "-" * len(text[0])
    return [text[0], rule, *text[1:-1], rule, text[-1]]


def _shorten(name: str, width: int) -> str:
    """Cut the leading parts of a name to their first letters, then replace its middle by dots."""
    name = name.removesuffix(".weight")
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > width and not part[:1].isdigit():
            parts[i] = part[:1]
    name = ".".join(parts)
    if len(name) > width:
        head = (width - 2) // 2
        name = f"{name[:head]}..{name[head + 2 - width :]}"
    return name


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1000:  # at most three digits
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
