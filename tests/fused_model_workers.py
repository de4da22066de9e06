"""What the processes of tests/test_fuse_features.py run. A failure is a file with its traceback."""

from __future__ import annotations

import copy
import datetime
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_ops
from tests.fused_models import made
from tests.norm_cases import normal

Tensor = torch.Tensor
MODELS = ("a norm in a part, the add outside", "RMS norm by another name")


def replicated(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model.children():
        if next(child.parameters(), None) is not None:
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of two steps and of evaluation."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    outputs = []
    for _ in range(2):
        optimizer.zero_grad()
        y = model.train()(x)
        (y * torch.linspace(0, 7, y.numel()).cos().view_as(y)).sum().backward()
        optimizer.step()
        outputs.append(y.detach())
    with torch.no_grad():
        return [*outputs, model.eval()(x)]


def check(name: str, distribute: Callable[[nn.Module], nn.Module], rank: int) -> None:
    model, x = made(name)
    x = normal(*x.shape, seed=rank)
    expected = trained(distribute(copy.deepcopy(model)), x)
    found = trained(distribute(fused_ops.fuse(model)), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def work(rank: int, world: int, folder: str, backend: str) -> None:
    """Everything that process `rank` of `world` does. It stops at an error: the others would wait for it."""
    where = "init_process_group"
    try:
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timeout
        )
        torch.set_num_threads(1)
        with fused_ops.use_backend(backend):
            for distribute in (replicated, sharded):
                for name in MODELS:
                    where = f"{name}, {distribute.__name__}"
                    check(name, distribute, rank)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"failure_{rank}").write_text(f"process {rank}, {where}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
