"""FSDP2 with LoRAPreAdamW: weights, gradients and state sharded, checkpoints in shards.

    torchrun --nproc-per-node 2 examples/fsdp2.py runs/fsdp2

On GPUs by NCCL, without one on CPUs by gloo. Started again, on any number of processes, it goes on from its
last checkpoint.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lorapre import LoRAPreAdamW, coverage, param_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LR, RANK, WIDTH, BATCH = 1e-3, 8, 64, 24  # BATCH is that of all processes together


def layer() -> nn.Sequential:  # of your model; it is what FSDP2 gathers at a time
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Your data: the part of this process. Here inputs, and what a fixed matrix makes of them."""
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
    matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    here, processes = dist.get_rank(), dist.get_world_size()
    return x[here::processes].to(DEVICE), (x @ matrix)[here::processes].to(DEVICE)


def main(folder: Path, steps: int = 200) -> None:
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(layer(), layer()).to(DEVICE)
    for unit in (*model, model):
        fully_shard(unit, mesh=mesh)
    # After sharding: the optimizer takes the sharded weights.
    optimizer = LoRAPreAdamW(param_groups(model, rank=RANK), lr=LR, weight_decay=0.1)
    start = 0
    # The file .metadata is the last of a checkpoint: where it is, the checkpoint is whole.
    if done := sorted(path.parent for path in folder.glob("step-*/.metadata")):
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=done[-1])
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        start = int(done[-1].name.removeprefix("step-"))
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 20) * (1 - step / steps)
        x, y = batch(step)
        loss = (model(x) - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (steps // 4) == 0:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"step-{step + 1:06}")
            dist.all_reduce(mean := loss.detach() / dist.get_world_size())
            if dist.get_rank() == 0:
                print(f"step {step + 1}: loss {mean.item():.4f}")
    if dist.get_rank() == 0:
        print(coverage(optimizer))  # the bytes of this process


if __name__ == "__main__":
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
