"""The drop rate of the Add modules: refused when they are made, read when they are called, and 0 in evaluation, by
whatever statistics the norm goes there."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fused_ops
from tests.calls import scalar
from tests.norm_cases import DEVICE, normal

Tensor = torch.Tensor

# The constructor's own arguments, and the shape of x.
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "AddLayerNorm": ((5,), (3, 4, 5)),
    "AddRMSNorm": ((5,), (3, 4, 5)),
    "AddGroupNorm": ((2, 4), (3, 4, 5)),
    **{
        f"Add{kind}Norm{dims}d": ((4,), (3, 4, 3, 2, 5)[: dims + 2])
        for kind in ("Instance", "Batch", "Switch")
        for dims in (1, 2, 3)
    },
    "AddSyncBatchNorm": ((4,), (3, 4, 5)),  # a plain one, without a process group
}
every_module = pytest.mark.parametrize("name", SIZES)
NOT_RATES = [-0.1, -1, 1.5, 1.0000001, float("nan"), float("inf")]


def made(name: str, **keywords: Any) -> Any:
    """A module whose parameters are no ones and zeros."""
    module = getattr(fused_ops, name)(*SIZES[name][0], **{"device": DEVICE, "dtype": torch.float64, **keywords})
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, dtype=torch.float64, seed=seed + 10))
    return module


def inputs(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, residual = (normal(*SIZES[name][1], dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    return x, residual


def seeded(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return module(*tensors)


def state() -> Tensor:
    return torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()


def test_every_add_module_is_here():
    known = {name for name in vars(fused_ops) if name.startswith("Add")}
    assert known == set(SIZES)


@every_module
def test_a_rate_is_refused_when_a_module_is_made(name):
    for p in NOT_RATES:
        with pytest.raises(ValueError, match=rf"{name}: dropout_p .*{float(p)}"):
            made(name, dropout_p=p)
    for value in (None, [0.5], "0.5"):
        with pytest.raises(TypeError, match=rf"{name}: dropout_p must be a number, but is "):
            made(name, dropout_p=value)
    assert made(name, dropout_p=1).dropout_p == 1.0 and made(name, dropout_p=torch.tensor(0.25)).dropout_p == 0.25


@every_module
def test_a_rate_is_read_when_a_module_is_called(name, each_backend):
    """As a schedule that changes it in training has it. What is refused moves no statistics and is not counted."""
    module, (x, residual) = made(name), inputs(name)
    assert module.dropout_p == 0.0 and "dropout_p" not in repr(module)
    before = copy.deepcopy(module.state_dict())
    module.dropout_p = 1.5
    with pytest.raises(ValueError, match=r"dropout_p .* 1\.5"):
        module(x, residual)
    after = module.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    module.dropout_p = 1.0
    assert repr(module).endswith("dropout_p=1.0)")
    y, total = module(x, residual)
    assert torch.equal(total, residual) and y.shape == x.shape


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        *((name, {}) for name in SIZES),
        *(
            (name, {"track_running_stats": "Batch" not in name})
            for name in SIZES
            if "Instance" in name or "Batch" in name
        ),
    ],
)
def test_nothing_is_dropped_in_evaluation(name, keywords, each_backend):
    """Neither where the norm goes by the statistics of its input in evaluation as well."""
    module, whole = made(name, dropout_p=0.5, **keywords), made(name, **keywords)
    x, residual = inputs(name)
    assert not torch.equal(module(x, residual)[1], residual + x)
    whole.load_state_dict(module.state_dict())
    before = state()
    found = []
    for evaluated in (module.eval(), whole.eval()):
        outputs = evaluated(x, residual)
        found.append((*outputs, *torch.autograd.grad(scalar(outputs), (x, residual))))
    assert all(map(torch.equal, *found)) and torch.equal(state(), before)
    assert not torch.equal(module.train()(x, residual)[1], residual + x)


@pytest.mark.parametrize("name", [name for name in SIZES if "Batch" in name])
def test_running_statistics_are_those_of_what_was_normalized(name, each_backend):
    module, twin = (made(name, dropout_p=p, momentum=0.5) for p in (0.5, 0.0))
    x, residual = inputs(name)
    _, total = seeded(module, x, residual)
    twin(torch.zeros_like(x), total.detach())
    for key, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[key])
    assert module.num_batches_tracked == 1


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
@every_module
def test_a_copy_has_the_rate_and_drops_the_same(name, duplicate, each_backend):
    module, (x, residual) = made(name, dropout_p=0.5, activation="gelu"), inputs(name)
    twin = duplicate(module)
    assert repr(twin) == repr(module) and twin.dropout_p == 0.5
    assert all(map(torch.equal, seeded(twin, x, residual), seeded(module, x, residual)))
    twin.dropout_p = 0.0
    assert module.dropout_p == 0.5


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_synchronized_norm_has_the_rate_of_the_one_that_it_is_made_of(dims):
    name = f"AddBatchNorm{dims}d"
    module, (x, residual) = made(name, dropout_p=0.25), inputs(name)
    expected = seeded(module, x, residual)
    converted = fused_ops.convert_sync_batchnorm(nn.Sequential(module))[0]
    assert type(converted) is fused_ops.AddSyncBatchNorm and converted.dropout_p == 0.25
    assert all(map(torch.equal, seeded(converted, x, residual), expected))
