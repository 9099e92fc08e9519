"""The processes that torchrun or accelerate launch started, and what they do together."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lorapre_recipes.config import UserError

T = TypeVar("T")

# A process gives up when it has waited so long for another. Rank 0 may train a tokenizer meanwhile.
TIMEOUT = timedelta(minutes=10)


def join() -> None:
    """Join the other processes, if there are any. May be called again."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(rank("LOCAL_RANK"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)


def leave() -> None:
    """Part from the other processes, at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def processes() -> int:
    """How many run this program."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank(variable: str = "RANK") -> int:
    """The number of this process, before `join` too; LOCAL_RANK is that on its machine."""
    return int(os.environ.get(variable, "0"))


def is_main() -> bool:
    """Whether this process is the one that prints and writes the run folder."""
    return rank() == 0


def barrier() -> None:
    """Wait for all."""
    if dist.is_initialized():
        dist.barrier()


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone; every rank returns its result, or raises its UserError."""
    outcome: list[Any] = [None]
    if is_main():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[0] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]  # type: ignore[no-any-return]


@contextmanager
def first_on_its_machine() -> Iterator[None]:
    """One process of each machine runs the block first; the others then find its files."""
    first = rank("LOCAL_RANK") == 0
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:
            barrier()


def anyone(here: bool) -> bool:
    """Whether it is so in any of the processes. All must ask."""
    if not dist.is_initialized():
        return here
    flag = torch.tensor(int(here))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error` says that another process has gone or does not answer."""
    if not dist.is_initialized() or processes() == 1:
        return False
    # Gloo's are plain RuntimeErrors, and a checkpoint's wraps those of all ranks in its text.
    gone = ("gloo/transport", "Connection closed by", "Connection reset by", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(words in str(error) for words in gone)
