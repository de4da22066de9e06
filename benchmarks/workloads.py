"""The named workloads, one list for tests, audit and benchmarks.

A workload is a call of fused_ops at a size somebody uses: its inputs, our call, and the torch composition that it
stands for. A norm that is not here yet adds an entry to FUNCTIONS, and to Workload, with a default, what else it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as TF

from fused_ops import functional as F

Tensor = torch.Tensor
Shape = tuple[int, ...]
Size = Literal["full", "reduced", "tiny"]
Call = Callable[..., "Tensor | tuple[Tensor, ...]"]  # takes the inputs as keyword arguments

EPS = 1e-5  # torch's for LayerNorm, and Llama 3's for RMSNorm, whose default differs between releases of torch


@dataclass(frozen=True)
class Case:
    """The tensors of one workload at one size and type; all inputs require a gradient, each output is given one."""

    inputs: dict[str, Tensor]
    parameters: frozenset[str]  # those inputs that belong to the model rather than to the call
    output_gradients: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another type."""
        inputs = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in self.inputs.items()}
        return Case(inputs, self.parameters, tuple(gradient.to(dtype) for gradient in self.output_gradients))


@dataclass(frozen=True)
class Shapes:
    """full: for a GPU. reduced: for a CPU, where a call should last milliseconds. tiny: for tests that interpret."""

    full: Shape
    reduced: Shape
    tiny: Shape


@dataclass(frozen=True)
class Workload:
    """A call at a size: `function` of fused_ops.functional, with a residual and an activation or without.

    launch_bound: so small that the call, not the memory, is what takes time. in_default_run: otherwise only --full
    has it. compiled_on_cpu: the default run on a CPU compiles it too, at some 20 s a workload.
    """

    name: str
    function: str
    shapes: Shapes
    residual: bool = False
    activation: str | None = None
    launch_bound: bool = False
    in_default_run: bool = True
    compiled_on_cpu: bool = False

    @property
    def adds_first(self) -> bool:
        """Whether the residual is added before the norm and the sum returned beside y."""
        return self.function.startswith("add_")

    def shape(self, size: Size) -> Shape:
        """The shape of x."""
        shape: Shape = getattr(self.shapes, size)
        return shape

    def case(self, size: Size, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Case:
        """Inputs drawn from a seed: standard normal activations and gradients, weights about 1, biases about 0."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(shape: Shape, deviation: float, mean: float) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            return values.mul_(deviation).add_(mean).to(dtype)

        return self.case_of(self.shape(size), draw)

    def case_of(self, shape: Shape, draw: Callable[[Shape, float, float], Tensor]) -> Case:
        """The tensors of a call on an x of this shape, each from draw(shape, deviation, mean)."""
        has_residual = self.residual or self.adds_first
        activations = ("x", "residual") if has_residual else ("x",)
        inputs = {name: draw(shape, 1.0, 0.0) for name in activations}
        parameters = FUNCTIONS[self.function].parameters(shape)
        inputs |= {name: draw(own_shape, 0.1, mean) for name, (own_shape, mean) in parameters.items()}
        gradients = tuple(draw(shape, 1.0, 0.0) for _ in range(2 if self.adds_first else 1))
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        return Case(inputs, frozenset(parameters), gradients)

    def ours(self) -> Call:
        """The call of fused_ops."""
        return FUNCTIONS[self.function].ours(self)

    def torch_composition(self) -> Call:
        """What a user of torch writes in its place, every operation out of place."""
        return FUNCTIONS[self.function].torch_composition(self)


@dataclass(frozen=True)
class Function:
    """A function of fused_ops: the shape and mean of each parameter, our call, and torch's composition."""

    parameters: Callable[[Shape], dict[str, tuple[Shape, float]]]
    ours: Callable[[Workload], Call]
    torch_composition: Callable[[Workload], Call]


TORCH_ACTIVATIONS: Mapping[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": TF.relu,
    "gelu": TF.gelu,
    "silu": TF.silu,
}


def finish(normalized: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(normalized + residual) in plain torch."""
    return TORCH_ACTIVATIONS[activation](normalized if residual is None else normalized + residual)


def _torch_layer_norm(workload: Workload) -> Call:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(TF.layer_norm(x, weight.shape, weight, bias, EPS), residual, workload.activation)

    return call


def _torch_rms_norm(workload: Workload) -> Call:
    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(TF.rms_norm(x, weight.shape, weight, EPS), residual, workload.activation)

    return call


def _torch_add_layer_norm(workload: Workload) -> Call:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return finish(TF.layer_norm(total, weight.shape, weight, bias, EPS), None, workload.activation), total

    return call


def _torch_add_rms_norm(workload: Workload) -> Call:
    def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return finish(TF.rms_norm(total, weight.shape, weight, EPS), None, workload.activation), total

    return call


FUNCTIONS: Mapping[str, Function] = {
    "layer_norm": Function(
        lambda shape: {"weight": (shape[-1:], 1.0), "bias": (shape[-1:], 0.0)},
        lambda workload: (
            lambda x, weight, bias, residual=None: F.layer_norm(
                x, weight.shape, weight, bias, EPS, residual=residual, activation=workload.activation
            )
        ),
        _torch_layer_norm,
    ),
    "rms_norm": Function(
        lambda shape: {"weight": (shape[-1:], 1.0)},
        lambda workload: (
            lambda x, weight, residual=None: F.rms_norm(
                x, weight.shape, weight, EPS, residual=residual, activation=workload.activation
            )
        ),
        _torch_rms_norm,
    ),
    "add_layer_norm": Function(
        lambda shape: {"weight": (shape[-1:], 1.0), "bias": (shape[-1:], 0.0)},
        lambda workload: (
            lambda x, residual, weight, bias: F.add_layer_norm(
                x, residual, weight.shape, weight, bias, EPS, activation=workload.activation
            )
        ),
        _torch_add_layer_norm,
    ),
    "add_rms_norm": Function(
        lambda shape: {"weight": (shape[-1:], 1.0)},
        lambda workload: (
            lambda x, residual, weight: F.add_rms_norm(
                x, residual, weight.shape, weight, EPS, activation=workload.activation
            )
        ),
        _torch_add_rms_norm,
    ),
}


# --- sizes ---------------------------------------------------------------------------------------------------------

# A GPU's caches hold up to some 60 MB (an H200's 50), so that a figure of bandwidth needs tensors above that: 2^26
# elements are 128 MiB in 16 bits, the same for every span, so that the spans read as one curve.
FULL_ELEMENTS = 2**26
# 32 MiB of float32 on a CPU: a call, which touches two and more of them, finds little in the caches, and lasts some
# milliseconds. Python's part of it is some 30 us, since a call that has swept the caches finds Python's own code and
# objects gone as well.
REDUCED_ELEMENTS = 2**23
# A program, or several rows of one, and a remainder: enough for an interpreter.
TINY_ROWS = 3


def swept(span: int) -> Shapes:
    """As many rows of the span as the volumes above hold."""
    return Shapes((FULL_ELEMENTS // span, span), (REDUCED_ELEMENTS // span, span), (TINY_ROWS, span))


def tokens(full: Shape, reduced: Shape, hidden: int) -> Shapes:
    """Activations of a model: batch and sequence, then the hidden size."""
    return Shapes((*full, hidden), (*reduced, hidden), (1, TINY_ROWS, hidden))


def _named(*workloads: Workload) -> dict[str, Workload]:
    names = [workload.name for workload in workloads]
    if len(set(names)) != len(names):
        raise ValueError(f"workload names must be unique, but are {names}")
    return dict(zip(names, workloads, strict=True))


# Hidden sizes and sequence lengths of the models, from their configurations.
GPT2, GPT2_CONTEXT = 768, 1024
LLAMA_3_8B, LLAMA_3_8B_CONTEXT = 4096, 8192
VIT_B, VIT_B_TOKENS = 768, 197  # 14 x 14 patches and the class token: a number of rows that no tile divides

WORKLOADS: Mapping[str, Workload] = _named(
    # The spans, bare. 256: several rows share a program, 512 bytes a row. 1024: where section 5 of the design asks for
    # the full rate. 4096: the widest row a warp group holds comfortably. 16384: the largest that stays on chip. 65536:
    # rows are walked in chunks, and the 128 (GPU: 1024) of them must fill the device.
    Workload("layer_norm_256", "layer_norm", swept(256)),
    Workload("layer_norm_1024", "layer_norm", swept(1024), compiled_on_cpu=True),
    Workload("layer_norm_4096", "layer_norm", swept(4096)),
    Workload("layer_norm_16384", "layer_norm", swept(16384)),
    Workload("layer_norm_65536", "layer_norm", swept(65536)),
    # The spans between, on the other norm and with the residual stream: 8192 is the largest row that the backward holds
    # with its weight gradients, 32768 the largest that a bare forward holds.
    Workload("rms_norm_512", "rms_norm", swept(512), in_default_run=False),
    Workload("rms_norm_2048", "rms_norm", swept(2048), in_default_run=False),
    Workload("rms_norm_8192", "rms_norm", swept(8192)),
    Workload("rms_norm_32768", "rms_norm", swept(32768), in_default_run=False),
    Workload("add_rms_norm_2048", "add_rms_norm", swept(2048), in_default_run=False),
    Workload("add_rms_norm_8192", "add_rms_norm", swept(8192), in_default_run=False),
    Workload("add_rms_norm_32768", "add_rms_norm", swept(32768)),
    # GPT-2 (124 M): a batch of 64 full contexts is 96 MiB in 16 bits; 8 of them, 24 MiB of float32, occupy a CPU.
    Workload("gpt2_layer_norm", "layer_norm", tokens((64, GPT2_CONTEXT), (8, GPT2_CONTEXT), GPT2)),
    Workload("gpt2_add_layer_norm", "add_layer_norm", tokens((64, GPT2_CONTEXT), (8, GPT2_CONTEXT), GPT2)),
    # Llama 3 8B: two contexts are 128 MiB in 16 bits; on a CPU a quarter of one context, 32 MiB.
    Workload("llama3_8b_rms_norm", "rms_norm", tokens((2, LLAMA_3_8B_CONTEXT), (1, 2048), LLAMA_3_8B)),
    Workload(
        "llama3_8b_add_rms_norm",
        "add_rms_norm",
        tokens((2, LLAMA_3_8B_CONTEXT), (1, 2048), LLAMA_3_8B),
        compiled_on_cpu=True,
    ),
    # ViT-B/16 at 224 x 224: a training batch of 256 images is 74 MiB in 16 bits; on a CPU 64, 37 MiB of float32.
    Workload("vit_b_layer_norm", "layer_norm", tokens((256, VIT_B_TOKENS), (64, VIT_B_TOKENS), VIT_B)),
    Workload(
        "vit_b_add_layer_norm",
        "add_layer_norm",
        tokens((256, VIT_B_TOKENS), (64, VIT_B_TOKENS), VIT_B),
        compiled_on_cpu=True,
    ),
    # What else is fused, at the one span 1024, so that each line shows the price of its part: the activation alone, the
    # residual alone, both with a slope that takes any value, and both with one that takes two (a mask is kept).
    Workload("layer_norm_gelu", "layer_norm", swept(1024), activation="gelu"),
    Workload("layer_norm_residual", "layer_norm", swept(1024), residual=True, in_default_run=False),
    Workload(
        "layer_norm_residual_gelu", "layer_norm", swept(1024), residual=True, activation="gelu", compiled_on_cpu=True
    ),
    Workload("layer_norm_residual_relu", "layer_norm", swept(1024), residual=True, activation="relu"),
    Workload("rms_norm_silu", "rms_norm", swept(1024), activation="silu", in_default_run=False),
    Workload("rms_norm_residual_silu", "rms_norm", swept(1024), residual=True, activation="silu"),
    Workload("add_layer_norm_relu", "add_layer_norm", swept(1024), activation="relu", in_default_run=False),
    Workload("add_rms_norm_silu", "add_rms_norm", swept(1024), activation="silu", in_default_run=False),
    # Launch-bound: a step of decoding, one new token of each of 8 (GPT-2) or 16 (Llama) sequences, and one image. They
    # fit any cache, and what counts is the time a launch takes on the device and on the host.
    Workload("gpt2_decode_add_layer_norm", "add_layer_norm", tokens((8, 1), (8, 1), GPT2), launch_bound=True),
    Workload("llama3_8b_decode_rms_norm", "rms_norm", tokens((16, 1), (16, 1), LLAMA_3_8B), launch_bound=True),
    Workload("llama3_8b_decode_add_rms_norm", "add_rms_norm", tokens((16, 1), (16, 1), LLAMA_3_8B), launch_bound=True),
    Workload(
        "vit_b_one_image_add_layer_norm",
        "add_layer_norm",
        tokens((1, VIT_B_TOKENS), (1, VIT_B_TOKENS), VIT_B),
        launch_bound=True,
    ),
)


def elements(shape: Shape) -> int:
    """The number of elements of a shape."""
    return math.prod(shape)
