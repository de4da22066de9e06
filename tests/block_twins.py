"""The blocks as one writes them with torch.nn alone, every add and activation spelt out, and the comparison with them.

All state_dicts have the keys of `fused_ops.blocks`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from tests.calls import as_tuple, scalar
from tests.norm_cases import DEVICE
from tests.switch_norm_calls import composed

NORMS = ("batch", "layer", "rms", "group", "instance", "switch")


class Moved(nn.Module):
    """A norm of the channels in dim `source` that wants them in dim `destination`."""

    def __init__(self, norm: nn.Module, source: int, destination: int) -> None:
        super().__init__()
        self.norm, self.dims = norm, (source, destination)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(*self.dims)).movedim(*reversed(self.dims))


class SwitchNorm(nn.Module):
    """Switchable norm of torch's means and variances; torch has none."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, size in (("weight", channels), ("bias", channels), ("mean_weight", 3), ("var_weight", 3)):
            self.register_parameter(name, nn.Parameter(torch.ones(size)))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        running = (self.running_mean, self.running_var)
        (y,) = composed("switch_norm", self.training, running=running)(x, **dict(self.named_parameters()))
        if self.training:
            over = (0, *range(2, x.dim()))
            self.running_mean.lerp_(x.detach().mean(over), 0.1)
            self.running_var.lerp_(x.detach().var(over), 0.1)
        return y


def two_channels_a_group(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 2, channels)


IMAGE_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "rms": lambda channels: Moved(nn.RMSNorm(channels), 1, -1),
    "group": two_channels_a_group,
    "instance": functools.partial(nn.InstanceNorm2d, affine=True),
    "switch": SwitchNorm,
}

SEQUENCE_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": lambda channels: Moved(nn.BatchNorm1d(channels), -1, 1),
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "group": lambda channels: Moved(two_channels_a_group(channels), -1, 1),
    "instance": lambda channels: Moved(nn.InstanceNorm1d(channels, affine=True), -1, 1),
    "switch": lambda channels: Moved(SwitchNorm(channels), -1, 1),
}


class StandardizedConv2d(nn.Conv2d):
    """Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", arXiv:1903.10520."""

    def forward(self, x: Tensor) -> Tensor:
        filters = self.weight.flatten(1)
        var = filters.var(1, correction=0, keepdim=True)
        standardized = (filters - filters.mean(1, keepdim=True)) / (var + 1e-5).sqrt()
        return TF.conv2d(x, standardized.view_as(self.weight), None, self.stride, self.padding)


class Block(nn.Module):
    """The parameters of a block whose convolutions have these sizes, and its activation."""

    sizes: tuple[int, ...] = (3, 3)
    strided = 1
    """Which convolution has the stride, counted from 1."""
    narrowing = 1
    """How often fewer channels all but the last one have."""
    projection_norm = True

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        norm: str = "batch",
        activation: Callable[[Tensor], Tensor] = torch.relu,
        residual: bool = True,
        weight_standardization: bool = False,
    ) -> None:
        super().__init__()
        conv = StandardizedConv2d if weight_standardization else nn.Conv2d
        self.activation = activation
        channels = inputs
        for number, size in enumerate(self.sizes, 1):
            width = outputs if number == len(self.sizes) else outputs // self.narrowing
            step = stride if number == self.strided else 1
            self.add_module(f"conv{number}", conv(channels, width, size, step, size // 2, bias=False))
            self.add_module(f"norm{number}", IMAGE_NORMS[norm](width))
            channels = width
        self.shortcut: nn.Module | None = nn.Sequential() if residual else None
        if residual and (stride, inputs) != (1, outputs):
            self.shortcut = conv(inputs, outputs, 1, stride, bias=False)
            if self.projection_norm:
                self.shortcut = nn.Sequential(self.shortcut, IMAGE_NORMS[norm](outputs))

    def added(self, z: Tensor, x: Tensor) -> Tensor:
        return z if self.shortcut is None else z + self.shortcut(x)


class BasicBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm1(self.conv1(x)))
        return self.activation(self.added(self.norm2(self.conv2(y)), x))


class Bottleneck(Block):
    sizes, strided, narrowing = (1, 3, 1), 2, 4

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm1(self.conv1(x)))
        y = self.activation(self.norm2(self.conv2(y)))
        return self.activation(self.added(self.norm3(self.conv3(y)), x))


class PreActivationBlock(Block):
    projection_norm = False

    def forward(self, y: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        branch = self.conv2(self.activation(self.norm1(self.conv1(y))))
        total = branch + (total if isinstance(self.shortcut, nn.Sequential) else self.shortcut(y))
        return self.activation(self.norm2(total)), total


class ResNet(nn.Module):
    """`fused_ops.blocks.ResNet` of three stages that have so many blocks each."""

    def __init__(self, count: int, norm: str, version: int, residual: bool, width: int) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, width, 3, padding=1, bias=False), IMAGE_NORMS[norm](width)
        self.blocks = nn.ModuleList()
        self.by_total = residual and version == 2
        for channels in (width, 2 * width, 4 * width):
            for index in range(count):
                sizes = (channels // 2, channels, 2) if index == 0 and channels > width else (channels, channels, 1)
                block = PreActivationBlock if self.by_total else BasicBlock
                self.blocks.append(block(*sizes, norm=norm, residual=residual))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        y = total = torch.relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            if self.by_total:
                y, total = block(y, total)
            else:
                y = block(y)
        return self.head(y.mean((2, 3)))


class EncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn's own block, with any norm, and with a scale if it is given one."""

    def __init__(self, dim: int, num_heads: int, norm: str = "layer", layer_scale: float | None = None) -> None:
        super().__init__(dim, num_heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm1, self.norm2 = SEQUENCE_NORMS[norm](dim), SEQUENCE_NORMS[norm](dim)
        for name in ("scale1", "scale2"):
            self.register_parameter(name, None if layer_scale is None else nn.Parameter(torch.empty(dim)))

    def _sa_block(self, *args: Any, **kwargs: Any) -> Tensor:
        branch = super()._sa_block(*args, **kwargs)
        return branch if self.scale1 is None else self.scale1 * branch

    def _ff_block(self, x: Tensor) -> Tensor:
        branch = super()._ff_block(x)
        return branch if self.scale2 is None else self.scale2 * branch


OF_TORCH = {
    "attention.qkv.weight": "self_attn.in_proj_weight",
    "attention.qkv.bias": "self_attn.in_proj_bias",
    "attention.out": "self_attn.out_proj",
    "mlp.0": "linear1",
    "mlp.2": "linear2",
    "add1.scale": "scale1",
    "add2.scale": "scale2",
}


def torchs_name(key: str) -> str:
    """The name in an `EncoderLayer`, or a stack of them, of what has this name in a TransformerBlock."""
    for ours, theirs in OF_TORCH.items():
        key = key.replace(ours, theirs)
    return key


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 with parameters and running statistics that are no fixed point of anything."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor), alpha=0.3)
    return module.to(DEVICE)


def inputs(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes)


def assert_equal_to_twin(
    ours: nn.Module, twin: nn.Module, *tensors: Tensor, name: Callable[[str], str] = lambda key: key
) -> None:
    """Outputs, gradients of inputs and parameters, and running statistics are those of the twin with the same state."""
    twin.double().to(DEVICE).train(ours.training)
    twin.load_state_dict({name(key): value for key, value in copy.deepcopy(ours.state_dict()).items()})
    found = []
    for module in (twin, ours):
        leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
        outputs = as_tuple(module(*leaves))
        found.append(
            (outputs, torch.autograd.grad(scalar(outputs), (*leaves, *module.parameters()), materialize_grads=True))
        )
    (expected, gradients), (outputs, ours_gradients) = found
    torch.testing.assert_close(outputs, expected)
    count = len(tensors)
    torch.testing.assert_close(ours_gradients[:count], gradients[:count])
    by_name = dict(zip((key for key, _ in twin.named_parameters()), gradients[count:], strict=True))
    for (key, _), gradient in zip(ours.named_parameters(), ours_gradients[count:], strict=True):
        torch.testing.assert_close(gradient, by_name[name(key)], msg=lambda text, key=key: f"gradient of {key}: {text}")
    buffers = dict(twin.named_buffers())
    for key, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[name(key)])
