"""InstanceNorm as modules: running statistics, one sample without a batch dim, and torch.nn's checks of the input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_ops
from tests.calls import as_tuple, scalar
from tests.channel_norm_calls import CHANNELS, INSTANCE, inputs, made, made_by_torch, torchs_class

Tensor = torch.Tensor

each_instance = pytest.mark.parametrize("name", INSTANCE)


@each_instance
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_are_torchs_over_several_calls(name, momentum, each_backend):
    keywords = {"momentum": momentum, "track_running_stats": True}
    module, torchs = made(name, **keywords), made_by_torch(name, **keywords)
    calls = [(True, (2,)), (True, (3,)), (False, (2,)), (True, ()), (False, ())]
    for seed, (training, batch) in enumerate(calls):
        module.train(training), torchs.train(training)
        x, *residual = inputs(name, batch, seed=10 * seed)
        expected = torchs(x if not residual else residual[0] + x)
        torch.testing.assert_close(as_tuple(module(x, *residual))[0], expected)
        torch.testing.assert_close(dict(module.named_buffers()), dict(torchs.named_buffers()))
    assert module.num_batches_tracked == 0  # torch's instance norm does not count


@each_instance
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_input_moves_float32_statistics(name, dtype, each_backend):
    module = made(name, track_running_stats=True).float()
    x, *residual = ((tensor * 16).round() / 16 for tensor in inputs(name, dtype=dtype))  # whose sum every type holds
    module(x, *residual)
    assert module.running_mean.dtype == torch.float32
    plane = tuple(range(2, x.dim()))
    total = (x if not residual else residual[0] + x).double()
    mean, var = total.mean(plane).mean(0) * 0.1, 0.9 + total.var(plane).mean(0) * 0.1
    torch.testing.assert_close((module.running_mean, module.running_var), (mean.float(), var.float()))


@each_instance
@pytest.mark.parametrize("affine", [True, False])
def test_one_sample_needs_no_batch_dim(name, affine, each_backend):
    module = made(name, affine=affine, activation="gelu")
    x, residual = (tensor.requires_grad_() for tensor in inputs("Add" + name.removeprefix("Add"), ()))
    batched = as_tuple(module(x[None], residual[None]))
    alone = as_tuple(module(x, residual))
    for one, many in zip(alone, batched, strict=True):
        assert one.shape == x.shape and torch.equal(one, many[0])
    expected = torch.autograd.grad(scalar(batched), (x, residual))
    torch.testing.assert_close(torch.autograd.grad(scalar(alone), (x, residual)), expected)
    if not name.startswith("Add"):
        torchs = made_by_torch(name, affine=affine)
        torch.testing.assert_close(made(name, affine=affine)(x), torchs(x))


@each_instance
def test_a_residual_of_one_sample_is_one_sample(name, each_backend):
    module, (x, residual) = made(name), inputs("Add" + name.removeprefix("Add"), ())
    for other in (residual[None], residual[:, :1], residual.float()):
        with pytest.raises(
            ValueError, match=rf"{name}: residual must have .*{'type' if other.dtype != x.dtype else ''}"
        ):
            module(x, other)


def errors(call: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)


@each_instance
def test_inputs_of_other_dims_are_refused_with_torchs_words(name):
    x, *residual = inputs(name)
    for bad in (x[None], x[None, None], x[0, 0], x[:, :5]):
        assert errors(lambda x=bad: made(name)(x, *residual)) == errors(lambda x=bad: made_by_torch(name)(x))


@each_instance
def test_another_number_of_channels_without_affine_is_a_warning_as_torchs(name, each_backend):
    x, *residual = (tensor[:, :5] for tensor in inputs(name))
    messages = []
    for module, tensors in ((made(name, affine=False), (x, *residual)), (made_by_torch(name, affine=False), (x,))):
        with pytest.warns(UserWarning, match="does not match num_features") as caught:
            module(*tensors)
        messages.append([str(warning.message) for warning in caught])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(*inputs(name)[: len(tensors)])
    assert messages[0] == messages[1]


@each_instance
def test_a_plane_of_one_element_is_refused_in_training_alone(name, each_backend):
    module = made(name, track_running_stats=True)
    x, *residual = (tensor.mean(tuple(range(2, tensor.dim())), keepdim=True) for tensor in inputs(name))
    with pytest.raises(ValueError, match=r"more than one spatial element.*\(2, 6, 1"):
        module(x, *residual)
    assert not module.running_mean.any()
    assert as_tuple(module.eval()(x, *residual))[0].shape == x.shape


@each_instance
def test_a_checkpoint_of_before_running_statistics_is_refused_as_torchs(name):
    old = {"running_mean": torch.zeros(CHANNELS), "running_var": torch.ones(CHANNELS)}
    ours, torchs = (cls(CHANNELS) for cls in (getattr(fused_ops, name), torchs_class(name)))
    expected = errors(lambda: torchs.load_state_dict(dict(old)))
    kind, message = errors(lambda: ours.load_state_dict(dict(old)))
    assert (kind, message.replace(name, torchs_class(name).__name__)) == expected
