"""What a piece of code allocates, counted: for the memory benchmarks and for the tests that hold promises.

On the CPU torch's profiler records every call of the allocator, those inside kernels and in the backward
pass too, which a TorchDispatchMode would miss. On CUDA the caching allocator keeps the count itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function


class Segment(NamedTuple):
    """What is allocated between two marks, in bytes above the start."""

    label: Any
    start: int
    peak: int


Mark = Callable[[Any], None]  # called within the function that is measured; begins a segment of this label


def segments(fn: Callable[[Mark], Any], device: str | torch.device = "cpu") -> list[Segment]:
    """Run fn(mark) once and return what it allocates on a device, from mark to mark.

    The first segment, up to the first mark, has the label None. On the CPU the profiler does not see that
    memory is freed which was there before: where `fn` does that, the figures are too high, never too low.
    """
    return (_on_cuda if torch.device(device).type == "cuda" else _on_cpu)(fn, torch.device(device))


def peak_bytes(fn: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """The most that is allocated on a device while `fn` runs, in bytes above what is at the start."""
    return max(segment.peak for segment in segments(lambda _: fn(), device))


def _on_cpu(fn: Callable[[Mark], Any], device: torch.device) -> list[Segment]:
    labels: list[Any] = [None]

    def mark(label: Any) -> None:
        with record_function(f"[mark]{len(labels)}"):
            labels.append(label)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fn(mark)
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    live, found = 0, [Segment(None, 0, 0)]
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        name = event.name()
        if name.startswith("[mark]"):
            found.append(Segment(labels[int(name.removeprefix("[mark]"))], live, live))
        elif name == "[memory]" and event.device_type() == DeviceType.CPU:
            live += event.nbytes()
            found[-1] = found[-1]._replace(peak=max(found[-1].peak, live))
    return found


def _on_cuda(fn: Callable[[Mark], Any], device: torch.device) -> list[Segment]:
    # The caching allocator books what the host asks for, in the host's order: nothing needs to wait.
    base = torch.cuda.memory_allocated(device)
    found: list[Segment] = []
    label, start = None, 0
    torch.cuda.reset_peak_memory_stats(device)

    def mark(new: Any) -> None:
        nonlocal label, start
        found.append(Segment(label, start, torch.cuda.max_memory_allocated(device) - base))
        label, start = new, torch.cuda.memory_allocated(device) - base
        torch.cuda.reset_peak_memory_stats(device)

    fn(mark)
    mark(None)
    return found


def peak_resident_bytes(fn: Callable[[], Any]) -> int | None:
    """The same as the kernel sees it: growth of the resident set to its peak; None where it does not say.

    Coarser: pages that the process has been given before and kept are not counted again.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        start = _status("VmRSS")
        fn()
        return max(0, _status("VmHWM") - start)
    return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024
