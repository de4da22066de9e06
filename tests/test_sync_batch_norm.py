"""SyncBatchNorm in 2 and 3 processes is one process over the whole batch; and what it is where there is but one."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fused_ops
from fused_ops import functional as F
from fused_ops.distributed import add_sync_batch_norm, sync_batch_norm
from tests.calls import as_tuple, scalar
from tests.norm_cases import DEVICE, normal
from tests.sync_batch_norm_cases import CASES, Case, laid_out, one_process
from tests.sync_batch_norm_workers import work
from tests.tolerances import assert_within_budget

Tensor = torch.Tensor
SECONDS = 240  # until processes that hang are ended; a collective that hangs fails after 60
SUMMED = ("dweight", "dbias")
OF_EACH = ("running_mean", "running_var", "num_batches_tracked")


def in_processes(world: int, folder: Path) -> list[dict[tuple[str, str], dict[str, Any]]]:
    """What each process found. They fork from one that has imported everything; on a GPU nobody may fork."""
    context: Any = multiprocessing.get_context("spawn" if DEVICE.type == "cuda" else "forkserver")
    if DEVICE.type != "cuda":
        context.set_forkserver_preload(["tests.sync_batch_norm_workers"])
    backends = ("triton", "torch") if fused_ops.backend.HAS_TRITON else ("torch",)
    processes = [context.Process(target=work, args=(rank, world, str(folder), backends)) for rank in range(world)]
    deadline = time.monotonic() + SECONDS
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    failures = [path.read_text() for path in sorted(folder.glob("failure_*"))]
    assert not failures, "\n".join(failures)
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"results_{rank}") for rank in range(world)]


def check(case: Case, world: int, found: list[dict[str, Any]]) -> None:
    expected, eager = one_process(case, world, exact=True), one_process(case, world, exact=False)
    samples = sum(case.batches[:world])
    for rank, of_rank in enumerate(found):
        assert of_rank["collectives"] == ({"all_gather": 1}, {"all_reduce": 1}), "collectives, forward and backward"
        assert ("dx" in of_rank) == (rank not in case.frozen)
    for name, want in expected.items():
        if name == "num_batches_tracked":
            assert [int(of_rank[name]) for of_rank in found] == [case.steps] * world
            continue
        parts = [of_rank[name] for of_rank in found if name in of_rank]
        if name in OF_EACH:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between processes"
            got, terms = parts[0], 1
        elif name in SUMMED:
            got, terms = torch.stack(parts).sum(0), samples * want.numel()
        else:
            # Of what float64 judges float64 by, one process adds up at once, several in as many parts.
            got, terms = torch.cat(parts), world if case.dtype == torch.float64 else 1
        learns = torch.cat([torch.full((case.batches[i],), name != "dx" or i not in case.frozen) for i in range(world)])
        of_samples = name not in SUMMED and name not in OF_EACH
        compared, torchs = (tensor[learns] if of_samples else tensor for tensor in (want.cpu(), eager[name].cpu()))
        assert_within_budget(name, got, torchs, compared, terms=terms, stored=case.dtype)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="gloo, with a CPU for each process")
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.full)])
def test_it_is_one_process_over_the_whole_batch(world: int, tmp_path: Path) -> None:
    found = in_processes(world, tmp_path)
    wrong = []
    for key in found[0]:
        case = next(case for case in CASES if case.name == key[0])
        try:
            check(case, world, [of_rank[key] for of_rank in found])
        except AssertionError as error:
            wrong.append(f"{case.name} ({key[1]}): {error}")
    backends = {key[1] for key in found[0]}
    assert "torch" in backends and len(found[0]) == len(backends) * len(CASES)
    assert not wrong, "\n".join(wrong)


# --- in one process -------------------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[Any]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(9, 5), (3, 6, 4, 3), (2, 3, 17, 16)], ids=["rows", "short", "planes"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("add_first", [False, True], ids=["after", "first"])
@pytest.mark.usefixtures("memory_checked", "each_backend")
def test_a_group_of_one_finds_what_batch_norm_does(
    shape: tuple[int, ...], activation: str | None, add_first: bool, alone: Any
) -> None:
    x, residual = (normal(*shape, dtype=torch.float64, seed=seed) for seed in (0, 1))
    weight, bias = (normal(shape[1], dtype=torch.float64, seed=seed) for seed in (2, 3))
    operands = [tensor.requires_grad_() for tensor in (x, residual, weight, bias)]
    found = []
    for function in (add_sync_batch_norm, F.add_batch_norm) if add_first else (sync_batch_norm, F.batch_norm):
        keywords: dict[str, Any] = {"group": alone} if "group" in inspect.signature(function).parameters else {}
        running = torch.zeros_like(bias), torch.ones_like(bias)
        keywords |= {"weight": weight, "bias": bias, "training": True, "residual": residual, "activation": activation}
        outputs = as_tuple(function(x, running_mean=running[0], running_var=running[1], **keywords))
        found.append((*outputs, *running, *torch.autograd.grad(scalar(outputs), operands)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("shape", [(9, 5), (3, 6, 4, 3), (2, 3, 17, 16)], ids=["rows", "short", "planes"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("memory_checked", "each_backend")
def test_a_group_of_one_drops_what_batch_norm_does(shape: tuple[int, ...], channels_last: bool, alone: Any) -> None:
    x, residual = (normal(*shape, dtype=torch.float64, seed=seed) for seed in (0, 1))
    x, residual = (laid_out(tensor) if channels_last else tensor for tensor in (x, residual))
    operands = [tensor.requires_grad_() for tensor in (x, residual, normal(shape[1], dtype=torch.float64, seed=2))]
    found = []
    for function, group in ((add_sync_batch_norm, {"group": alone}), (F.add_batch_norm, {})):
        running = torch.zeros_like(operands[2]), torch.ones_like(operands[2])
        torch.manual_seed(4)
        outputs = function(
            *operands[:2], *running, operands[2], training=True, dropout_p=0.4, activation="gelu", **group
        )
        found.append((*outputs, *running, *torch.autograd.grad(scalar(outputs), operands)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(found[0][1], found[1][1]) and not torch.equal(found[0][1], residual + x)


@pytest.mark.usefixtures("each_backend")
def test_it_refuses_a_drop_rate(alone: Any) -> None:
    x = normal(4, 3)
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"add_sync_batch_norm: dropout_p .*{p}"):
            add_sync_batch_norm(x, x, None, None, dropout_p=p, group=alone)
    with pytest.raises(TypeError, match="add_sync_batch_norm: dropout_p must be a number"):
        add_sync_batch_norm(x, x, None, None, dropout_p=None, group=alone)  # type: ignore[arg-type]


@pytest.mark.usefixtures("triton_backend")
def test_it_takes_three_launches_each_way(alone: Any, launches: list[str]) -> None:
    x = normal(4, 3, 5).requires_grad_()
    y = sync_batch_norm(x, None, None, normal(3), activation="relu", residual=normal(4, 3, 5), group=alone)
    assert launches == ["channel_moments_kernel", "combine_moments_kernel", "channel_apply_kernel"]
    launches.clear()
    y.sum().backward()
    assert launches == [
        "channel_gradient_sums_kernel", "combine_gradients_kernel", "channel_gradient_apply_kernel",
    ]  # fmt: skip


@pytest.mark.usefixtures("each_backend", "alone")
def test_alone_in_a_group_it_is_a_batch_norm() -> None:
    check_plain()


@pytest.mark.usefixtures("each_backend")
def test_without_a_group_it_is_a_batch_norm() -> None:
    check_plain()


def check_plain() -> None:
    torch.compiler.reset()
    x, residual = normal(4, 3, 5, 2), normal(4, 3, 5, 2, seed=1)
    for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        synchronized = fused_ops.SyncBatchNorm(3, activation="gelu", device=DEVICE, **options)
        adding = fused_ops.AddSyncBatchNorm(3, activation="gelu", device=DEVICE, **options)
        plain = fused_ops.BatchNorm2d(3, activation="gelu", device=DEVICE, **options)
        for mode in (True, True, False):
            assert torch.equal(synchronized.train(mode)(x, residual), plain.train(mode)(x, residual))
            ours, total = adding.train(mode)(x, residual)
            assert torch.equal(total, x + residual) and ours.shape == x.shape
        for ours, expected in zip(synchronized.buffers(), plain.buffers(), strict=True):
            assert torch.equal(ours, expected)
    module = fused_ops.SyncBatchNorm(3, activation="relu", device=DEVICE).eval()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_it_is_torchs_module() -> None:
    for cls in (fused_ops.SyncBatchNorm, fused_ops.AddSyncBatchNorm):
        assert issubclass(cls, nn.SyncBatchNorm)
        ours, torchs = cls(4, 1e-3, 0.2, activation="relu"), nn.SyncBatchNorm(4, 1e-3, 0.2)
        assert list(ours.state_dict()) == list(torchs.state_dict())
        assert repr(ours) == repr(torchs).replace("SyncBatchNorm(", f"{cls.__name__}(").replace(
            ")", ", activation=Activation('relu'))"
        )
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(copied) is cls and copied.activation == ours.activation


def test_it_refuses_what_torchs_refuses() -> None:
    module = fused_ops.SyncBatchNorm(3, device=DEVICE)
    with pytest.raises(ValueError, match="expected at least 2D input"):
        module(normal(3))
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        module(normal(3, 0))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(normal(1, 3))
    assert module.num_batches_tracked == 0


# --- conversion -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of ours, with a norm in two places and one that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fused_ops.BatchNorm2d(
            4, 1e-3, 0.2, activation=fused_ops.Activation("leaky_relu", negative_slope=0.2)
        )
        self.again = self.first
        self.added = fused_ops.AddBatchNorm2d(4, activation="gelu")
        self.torchs = nn.BatchNorm2d(4, affine=False, momentum=None)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.missing = None
        self.other = nn.Sequential(fused_ops.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.Sequential(nn.SyncBatchNorm(4)))

    def forward(self, x: Tensor) -> Tensor:
        y, total = self.added(self.again(self.first(x), residual=x), x)
        return self.untracked(self.torchs(y)) + self.other[:2](total)


def test_conversion_keeps_everything_but_the_classes() -> None:
    model = Block()
    with torch.no_grad():
        for seed, tensor in enumerate((*model.parameters(), *model.buffers())):
            if tensor.is_floating_point():
                tensor.copy_(normal(*tensor.shape, seed=seed).square().cpu() + 0.1)
    model.torchs.eval()
    model.torchs.weight_of_another = nn.Parameter(torch.ones(1))
    before, before_state = dict(model.named_parameters()), model.state_dict(keep_vars=True)
    expected = copy.deepcopy(model)
    group = object()
    converted = fused_ops.convert_sync_batchnorm(model, group)
    assert converted is model and model.first is model.again and model.missing is None
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)}
    ours = fused_ops.SyncBatchNorm
    assert kinds == {
        "first": ours, "added": fused_ops.AddSyncBatchNorm, "torchs": ours, "untracked": ours, "other.2.0": ours,
    }  # fmt: skip
    assert all(getattr(model.get_submodule(name), "process_group") is group for name in kinds)  # noqa: B009
    del before["torchs.weight_of_another"], before_state["torchs.weight_of_another"]
    assert dict(model.named_parameters()).keys() == before.keys()
    after_state = model.state_dict(keep_vars=True)
    assert after_state.keys() == before_state.keys()
    assert all(after_state[name] is tensor for name, tensor in before_state.items())
    assert (model.first.eps, model.first.momentum, model.torchs.momentum) == (1e-3, 0.2, None)
    assert model.first.activation == expected.first.activation and model.added.activation.name == "gelu"
    assert model.first.training and not model.torchs.training
    x = normal(2, 4, 3, 3).cpu()
    torch.testing.assert_close(model(x), expected(x))


def test_conversion_of_a_norm_itself() -> None:
    norm = nn.BatchNorm1d(3, dtype=torch.float64, bias=False)
    for convert in (fused_ops.convert_sync_batchnorm, fused_ops.SyncBatchNorm.convert_sync_batchnorm):
        converted = convert(norm)
        assert type(converted) is fused_ops.SyncBatchNorm and converted.process_group is None
        assert converted.weight is norm.weight and converted.bias is None and converted.activation is None
    other = nn.Linear(2, 2)
    assert fused_ops.convert_sync_batchnorm(other) is other
    with pytest.raises(ValueError, match="LazyBatchNorm2d does not know its number of channels"):
        fused_ops.convert_sync_batchnorm(nn.LazyBatchNorm2d())
