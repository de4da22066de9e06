"""What the processes of tests/test_sync_batch_norm.py run. A failure is a file with its traceback."""

from __future__ import annotations

import datetime
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import fused_ops
from fused_ops import collectives
from tests.calls import recorded
from tests.norm_cases import DEVICE, normal
from tests.sync_batch_norm_cases import CASES, Case, gradients_of_whole

Tensor = torch.Tensor
TIMEOUT = datetime.timedelta(seconds=60)
GATHER_SINGLE = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
COLLECTIVES = (
    "all_gather", GATHER_SINGLE, "all_reduce", "all_to_all", "all_to_all_single", "barrier", "broadcast",
    "gather", "isend", "irecv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send", "recv",
)  # fmt: skip


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the collectives that this process takes part in meanwhile."""
    counts: Counter[str] = Counter()

    def noting(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)

        def noted(*arguments: Any, **keywords: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **keywords)

        return noted

    with mock.patch.multiple(dist, **{name: noting(name) for name in COLLECTIVES}):
        yield counts


def work(rank: int, world: int, folder: str, backends: tuple[str, ...]) -> None:
    """Everything that process `rank` of `world` does. It stops at an error: the others would wait for it."""
    results: dict[tuple[str, str], dict[str, Any]] = {}
    where = "init_process_group"
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=TIMEOUT
        )
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        for backend in backends:
            with fused_ops.use_backend(backend):
                for case in CASES:
                    where = f"{case.name} ({backend})"
                    results[case.name, backend] = run(case, rank, world)
                for behaviour in BEHAVIOURS:
                    where = f"{behaviour.__name__} ({backend})"
                    behaviour(rank, world)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"failure_{rank}").write_text(f"process {rank}, {where}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
    torch.save(results, f"{folder}/results_{rank}")


def run(case: Case, rank: int, world: int) -> dict[str, Any]:
    """What this process gets, and its collectives forward and backward."""
    module = case.module()
    found: dict[str, Any] = {}
    for step in range(case.steps):
        x, residual = (case.of_process(tensor, rank) for tensor in case.of_whole(world, step))
        assert x is not None
        x.requires_grad_(rank not in case.frozen)
        if residual is not None:
            residual.requires_grad_()
        module.zero_grad()
        with counted() as forward:
            out = module(x) if residual is None else module(x, residual)
        outputs = out if isinstance(out, tuple) else (out,)
        arriving = [case.of_process(g, rank) for g in gradients_of_whole(case, world, step, len(outputs))]
        with counted() as backward:
            torch.autograd.backward(outputs, arriving)
        found = dict(zip(("y", "total"), outputs, strict=False)) | {"dx": x.grad}
        if residual is not None:
            found["dresidual"] = residual.grad
        assert outputs[0].stride() == x.stride() or 1 in x.shape or x.numel() == 0, "another layout"
    found |= {f"d{name}": parameter.grad for name, parameter in module.named_parameters()}
    found |= dict(module.named_buffers())
    tensors = {name: tensor.detach().cpu() for name, tensor in found.items() if tensor is not None}
    return tensors | {"collectives": (dict(forward), dict(backward))}


# --- what else holds, each of it the same in all processes ----------------------------------------------------------


def raises(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except error as raised:
        assert message in str(raised), str(raised)
    else:
        raise AssertionError(f"no {error.__name__}")


def state(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def assert_unchanged(module: nn.Module, before: list[Tensor]) -> None:
    assert all(map(torch.equal, module.state_dict().values(), before)), "running statistics moved"


def made(channels: int = 4, **options: Any) -> fused_ops.SyncBatchNorm:
    return fused_ops.SyncBatchNorm(channels, **{"device": DEVICE, **options})


def one_value_in_all(rank: int, world: int) -> None:
    module = made()
    before = state(module)
    x = normal(int(rank == 1), 4).requires_grad_()
    with counted() as counts:
        raises(ValueError, "more than 1 value per channel", lambda: module(x))
    assert counts == {"all_gather": 1}
    assert_unchanged(module, before)


def nothing_in_all(rank: int, world: int) -> None:
    module = made(activation="relu")
    before = state(module)
    x = normal(0, 4, 3).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape
    assert not module.weight.grad.any() and not module.bias.grad.any()
    assert all(map(torch.equal, list(module.buffers())[:2], before[2:4]))


def eval_is_plain(rank: int, world: int) -> None:
    module = made(activation="relu").eval()
    plain = fused_ops.BatchNorm1d(4, activation="relu", device=DEVICE).eval()
    x = normal(2 + rank, 4)
    with counted() as counts:
        assert torch.equal(module(x), plain(x))
        untracked = made(track_running_stats=False).eval()
        assert torch.equal(untracked(x), fused_ops.BatchNorm1d(4, device=DEVICE)(x))
    assert not counts


def without_gradients(rank: int, world: int) -> None:
    module = made(activation="relu")
    before = state(module)
    with torch.no_grad(), counted() as counts:
        y = module(normal(2 + rank, 4))
    assert not y.requires_grad and counts == {"all_gather": 1}
    assert not torch.equal(module.running_mean, before[2])


def an_error_comes_first(rank: int, world: int) -> None:
    module = made()
    before = state(module)
    with counted() as counts:
        raises(ValueError, "residual must have the input's shape", lambda: module(normal(3, 4), normal(3, 1)))
        raises(ValueError, "at least 2D", lambda: module(normal(3)))
        raises(ValueError, "should be non-zero", lambda: module(normal(3, 0)))
        raises(TypeError, "must be a number", lambda: fused_ops.distributed.sync_batch_norm(
            normal(3, 4), None, None, momentum=[0.1], group=dist.group.WORLD
        ))  # fmt: skip
    assert not counts
    assert_unchanged(module, before)


def a_late_error_changes_nothing(rank: int, world: int) -> None:
    for at in ("all_gather", GATHER_SINGLE):
        module = made(activation="relu")
        before = state(module)
        failing = mock.Mock(side_effect=RuntimeError("connection lost"))
        name = "gloo" if at == "all_gather" else "another"
        with (
            mock.patch.object(dist, at, failing),
            mock.patch.object(dist, "get_backend", lambda group, name=name: name),
        ):
            raises(RuntimeError, "connection lost", lambda module=module: module(normal(3, 4), normal(3, 4)))
        assert_unchanged(module, before)


def gathers_into_one_tensor(rank: int, world: int) -> None:
    x = normal(2 + rank, 4)
    expected = made()(x)
    with mock.patch.object(dist, "get_backend", lambda group: "another"), counted() as counts:
        assert torch.equal(made()(x), expected)
    assert counts == {GATHER_SINGLE: 1}


def no_second_derivative(rank: int, world: int) -> None:
    x = normal(2 + rank, 4).requires_grad_()
    for activation in (None, "gelu"):
        y = made(activation=activation)(x)
        (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        raises(RuntimeError, "differentiate twice", lambda dx=dx: dx.sum().backward())


def only_a_residual_learns(rank: int, world: int) -> None:
    module = made(affine=False, activation="gelu")
    residual = normal(2 * rank, 4).requires_grad_()  # empty in the first
    y = module(normal(2 * rank, 4, seed=1), residual)
    with counted() as counts:
        y.sum().backward()
    assert residual.grad is not None and not counts


def only_the_total_is_used(rank: int, world: int) -> None:
    module = fused_ops.AddSyncBatchNorm(4, device=DEVICE)
    x, residual = normal(2 * rank, 4).requires_grad_(), normal(2 * rank, 4, seed=1).requires_grad_()
    _, total = module(x, residual)
    with counted() as counts:
        total.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(residual.grad, x.grad) and not counts


def kept_is_no_more_than_torch_keeps(rank: int, world: int) -> None:
    for activation in (None, "relu", "gelu"):
        x = normal(2 + rank, 8, 3, 2).requires_grad_()
        residual = normal(2 + rank, 8, 3, 2, seed=1).requires_grad_()
        with recorded() as ours:
            made(8, activation=activation)(x, residual)
        with recorded() as torchs:
            z = nn.BatchNorm2d(8, device=DEVICE)(x) + residual
            _ = z if activation is None else getattr(torch.nn.functional, activation)(z)
        assert kept_bytes(ours) <= kept_bytes(torchs), (activation, kept_bytes(ours), kept_bytes(torchs))


def kept_bytes(kept: list[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(storages.values())


def a_compiler_steps_aside(rank: int, world: int) -> None:
    module = made(activation="relu")
    x = normal(2 + rank, 4).requires_grad_()
    expected = made(activation="relu")(x)
    compiled = torch.compile(module, backend="eager")
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, expected) and x.grad is not None and module.num_batches_tracked == 1


def of_one_group(rank: int, world: int) -> None:
    first = dist.new_group([0, 1], timeout=TIMEOUT)
    others = [dist.new_group([process], timeout=TIMEOUT) for process in range(2, world)]
    module = made(process_group=first if rank < 2 else others[rank - 2])
    x = normal(world, 3, 4)
    y = module(x[rank])
    together = x[:2].flatten(0, 1) if rank < 2 else x[rank]
    expected = fused_ops.BatchNorm1d(4, device=DEVICE)(together).view(-1, 3, 4)[rank if rank < 2 else 0]
    torch.testing.assert_close(y, expected)


def a_model_learns_as_in_one_process(rank: int, world: int) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = (nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 2))
        return nn.Sequential(*layers, fused_ops.BatchNorm2d(3, activation="gelu")).to(DEVICE, torch.float64)

    plain, learner = model(), fused_ops.convert_sync_batchnorm(model())
    # On a CPU DistributedDataParallel refuses any torch.nn.SyncBatchNorm, and so ours.
    under_ddp = DEVICE.type == "cuda"
    wrapped = nn.parallel.DistributedDataParallel(learner) if under_ddp else learner
    x = normal(2 * world, 2, 6, 6, dtype=torch.float64)
    for step in range(2):
        for net, batch, share in ((plain, x, world), (wrapped, x[2 * rank : 2 * rank + 2], 1)):
            net.zero_grad()
            (net(batch + step) ** 3).sum().div(share).backward()
            for parameter in net.parameters():
                if net is learner:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world
                parameter.data -= 0.01 * parameter.grad
    for (name, ours), expected in zip(learner.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def counts_are_merged_as_one(rank: int, world: int) -> None:
    """Against float64, of numbers whose mean is 1e6 deviations: no worse than what one process finds."""
    x = (1e4 + 1e-2 * normal(100 * (rank + 1), 4, dtype=torch.float64, seed=rank)).float()
    origin = x.mean(0)
    mean = (x - origin).mean(0)
    moments = collectives.Moments(origin, mean, (x - origin - mean).square().sum(0))
    found = collectives.gather_statistics(moments, x.shape[0], 0.0, dist.group.WORLD)
    every = [torch.empty(100 * (i + 1), 4, device=DEVICE) for i in range(world)]
    for i, values in enumerate(every):
        values.copy_((1e4 + 1e-2 * normal(100 * (i + 1), 4, dtype=torch.float64, seed=i)).float())
    var, exact = torch.var_mean(torch.cat(every).double(), 0, correction=0)
    assert (found.mean - exact).abs().max() <= torch.finfo(torch.float32).eps * 1e4
    torch.testing.assert_close(found.rstd.double(), var.rsqrt(), rtol=1e-5, atol=0)


BEHAVIOURS = (
    one_value_in_all,
    nothing_in_all,
    eval_is_plain,
    without_gradients,
    an_error_comes_first,
    a_late_error_changes_nothing,
    gathers_into_one_tensor,
    no_second_derivative,
    only_a_residual_learns,
    only_the_total_is_used,
    kept_is_no_more_than_torch_keeps,
    a_compiler_steps_aside,
    of_one_group,
    a_model_learns_as_in_one_process,
    counts_are_merged_as_one,
)
