"""The command line with a preset `tiny`, for processes that torchrun starts; one of them may kill itself.

LORAPRE_TEST_KILL="1 step 6": rank 1, at the start of step 6.
LORAPRE_TEST_KILL="1 interrupt 6": the same, by a signal that it can take.
LORAPRE_TEST_KILL="0 checkpoint 8": rank 0, when it should write the optimizer's shard of that checkpoint.
"""

import os
import signal
import sys
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter

from lorapre_recipes import cli, presets
from lorapre_recipes.config import OptimizerName, PretrainConfig
from lorapre_recipes.train import trainer as training
from tiny_runs import tiny_config


def tiny(optimizer: OptimizerName = "lorapre-adamw", **changes: Any) -> PretrainConfig:
    """Batches that two and three processes can divide."""
    return tiny_config(optimizer, **({"batch_size": 6, "eval_sequences": 12} | changes))


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def arm(rank: str, where: str, number: str) -> None:
    if os.environ.get("RANK", "0") != rank:
        return
    if where in ("step", "interrupt"):
        begin = training.Bookkeeper.on_step_begin

        def on_step_begin(self: Any, args: Any, state: Any, *rest: Any, **named: Any) -> None:
            if state.global_step + 1 == int(number):
                die(signal.SIGINT if where == "interrupt" else signal.SIGKILL)
            begin(self, args, state, *rest, **named)

        training.Bookkeeper.on_step_begin = on_step_begin
    else:
        write = FileSystemWriter.write_data

        def write_data(self: Any, *args: Any) -> Any:
            if f"checkpoint-{number}/optimizer" in str(self.path):
                die()
            return write(self, *args)

        FileSystemWriter.write_data = write_data


if __name__ == "__main__":
    presets.PRETRAIN["tiny"] = tiny
    if moment := os.environ.get("LORAPRE_TEST_KILL"):
        arm(*moment.split())
    sys.exit(cli.main())
