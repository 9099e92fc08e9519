"""FSDP2 whose weights, gradients and optimizer state stay in the memory of the host."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from distributed import run
from lorapre import coverage
from test_sharding import Net, check_model, make, net, tokens


def offload(model: Net) -> Net:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.block, model):
        fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return model


def check_offload() -> None:
    check_model(offload, True, ["adam-split", "muon-subspace"])
    model = offload(net())
    optimizer = make(model, "adam-split")
    model(tokens(0)).backward()
    optimizer.step()
    tensors = [
        value for own in optimizer.state.values() for value in own.values() if isinstance(value, Tensor)
    ]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    report = coverage(optimizer)
    assert report.state_bytes == report.planned_bytes


def test_weights_in_the_memory_of_the_host_train_as_in_one_process() -> None:
    run(check_offload, 2)
