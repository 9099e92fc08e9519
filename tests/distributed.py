"""Functions run on several processes, joined by gloo on the CPU."""

import faulthandler
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 1800  # long, so that a busy machine does not count as a hang
PRELOAD = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.tensor.debug",
    "torch.nn.parallel",
    "lorapre",
]


def run(function: Callable[..., None], world: int, *args: Any) -> None:
    """Call `function(*args)` on `world` processes. An exception in one of them ends all and fails the test.

    The processes are forked from a server that has imported torch once, so each costs little.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(
            _enter, (world, folder, function, args), nprocs=world, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + SECONDS
        try:
            while not processes.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} on {world} processes did not end")
        except mp.ProcessRaisedException as error:
            # The first failure is the cause. Others may have failed because they lost contact with it.
            times = [(path.read_text(), path.name) for path in Path(folder).glob("failed-*")]
            message = min(times)[0].partition("\n")[2] if times else str(error)
            raise AssertionError(f"{function.__name__} on {world} processes:\n{message}") from None
        finally:
            for process in processes.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _enter(rank: int, world: int, folder: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    faulthandler.enable()  # if a signal kills a process, the log shows its stack
    warnings.simplefilter("error")
    # The oldest triton.
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", module="triton")
    # Warnings of torch about itself: DTensor and the checkpoints use deprecated functions, and fork.
    for message in ("torch.distributed", "TypedStorage", "Profiler"):
        warnings.filterwarnings("ignore", message=rf".*{message}.*", module=r"torch\.")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=SECONDS / 2),
    )  # fmt: skip
    try:
        function(*args)
        dist.barrier()  # no process leaves while another one still communicates
    except Exception:
        failed = Path(folder, f"failed-{rank}")
        failed.write_text(f"{time.monotonic():020.6f} on process {rank}\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
