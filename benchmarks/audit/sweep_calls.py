"""The calls that the sweep of the launch tables chooses from: of both families, at spans and planes on either side of
every bound of the tables, aligned and ragged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fused_ops import functional as F
from fused_ops.kernels.activations import ACTIVATIONS

Tensor = torch.Tensor
Residual = Literal["none", "after", "before"]
Parameters = Literal["float32", "same type", "none", "frozen float32"]

RESIDUALS: tuple[Residual, ...] = ("none", "after", "before")
PARAMETERS: tuple[Parameters, ...] = ("float32", "same type", "none")
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32, torch.float64)
# Above, chunks of a row only get more steps of the same tile: 2^20 has the most chunks, 2^23 several steps.
WHOLE_ROWS = tuple(2**k for k in range(3, 16))
LONG_ROWS = (40_960, 2**16, 2**20, 2**23)
FEW, MANY = 8, 512  # rows: those that may have to be shared, and enough for a program each
WALKED_ROWS = tuple(2**k for k in range(11, 17))
# Channels of a group, groups, positions.
Planes = tuple[int, int, tuple[int, ...]]
WHOLE_GROUPS: tuple[Planes, ...] = (
    (10, 32, ()), (512, 4, ()),
    (1, 32, (4, 4)), (1, 64, (7, 7)), (1, 64, (32, 32)), (1, 64, (64, 64)), (1, 64, (128, 128)), (1, 32, (27, 37)),
    (2, 32, (64, 64)), (3, 10, (333,)), (8, 32, (7, 7)), (8, 32, (14, 14)), (8, 32, (28, 28)), (10, 32, (8, 8)),
    (16, 32, (16, 32)), (32, 32, (14, 14)), (40, 32, (16, 16)), (64, 32, (7, 7)), (4, 32, (32, 64)),
)  # fmt: skip
CUT_GROUPS: tuple[Planes, ...] = (
    (1, 32, (512, 256)), (1, 32, (181, 181)), (8, 32, (56, 56)), (80, 32, (16, 16)), (30, 3, (10, 100)),
    (30, 3, (25, 37)), (2048, 2, (3, 3)), (2048, 2, ()),
)  # fmt: skip
CHANNELS_LAST: tuple[Planes, ...] = (
    (1, 32, (64, 64)), (1, 3, (128, 128)), (10, 32, (64, 64)), (40, 32, (16, 16)), (8, 32, (7, 7)), (10, 3, (9, 37)),
)  # fmt: skip
# Samples, channels and positions: channels that fit on chip, up to the longest, and others.
BATCHES: tuple[tuple[int, ...], ...] = (
    (1, 64, 7, 7), (2, 30, 3), (250, 64, 7), (30, 64), (32, 64), (1000, 64), (4000, 30), (15, 64, 7, 7),
    (16, 64, 7, 7), (31, 64, 7, 7), (32, 64, 7, 7), (7, 64, 14, 14), (8, 64, 14, 14), (32, 64, 14, 14),
    (256, 64, 7, 7), (256, 64, 14, 14), (5, 30, 9, 11), (40, 30, 9, 11), (2, 30, 15, 15), (128, 64, 8, 8),
    (256, 64, 4, 4), (4, 64, 16, 16), (4, 64, 28, 28), (4, 64, 56, 56), (4, 30, 25, 37),
)  # fmt: skip
BATCHES_CHANNELS_LAST: tuple[tuple[int, ...], ...] = (
    (2, 64, 3, 3), (8, 64, 7, 7), (16, 64, 7, 7), (8, 30, 7, 7), (256, 64, 7, 7), (32, 30, 14, 14), (16, 64, 56, 56),
)  # fmt: skip
MIXED: tuple[tuple[tuple[int, ...], bool], ...] = (
    ((4, 64), False), ((4, 64, 7, 7), False), ((4, 64, 56, 56), False), ((4, 64, 33, 33), False),
    ((4, 30, 25, 37), False),
    ((4, 64, 56, 56), True), ((4, 30, 7, 7), True),
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What calls have in common that share no entry with others."""

    dtype: torch.dtype
    activation: str | None
    residual: Residual
    wide_residual: bool = False  # float32, with half x


@dataclass(frozen=True)
class Call:
    """A call of a norm, forward and backward, whose kernels are to be compiled; a subclass says which and how large."""

    kind: Kind
    parameters: Parameters

    @property
    def norm(self) -> str:
        """The norm's name, without the residual's place."""
        raise NotImplementedError

    @property
    def size(self) -> str:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def own_arguments(self) -> tuple[Any, ...]:
        """What the norm takes before its weight."""
        raise NotImplementedError

    @property
    def keywords(self) -> dict[str, Any]:
        """What else it takes."""
        return {}

    @property
    def channels(self) -> int:
        """Elements of weight and of bias."""
        raise NotImplementedError

    @property
    def function(self) -> str:
        """Its name in fused_ops.functional."""
        return ("add_" if self.kind.residual == "before" else "") + self.norm

    def __str__(self) -> str:
        kind = self.kind
        residual = "float32" if kind.wide_residual else "after" if kind.residual == "after" else None
        named = {
            "": f"{self.function}, {self.size}, {str(kind.dtype).removeprefix('torch.')}",
            "activation": kind.activation,
            "residual": residual,
            "parameters": None if self.parameters == "same type" else self.parameters,
        }
        return ", ".join(f"{name} {value}".strip() for name, value in named.items() if value)

    def input(self) -> Tensor:
        """x, with nothing in it."""
        return torch.empty(self.shape, dtype=self.kind.dtype)

    def run(self) -> None:
        """Forward and backward on tensors with nothing in them."""
        kind = self.kind
        x = self.input().requires_grad_()
        residual = None
        if kind.residual != "none":
            residual = torch.empty_like(x, dtype=torch.float32 if kind.wide_residual else None, requires_grad=True)
        parameters = self._parameters()
        norm: Callable[..., Any] = getattr(F, self.function)
        keywords = {"activation": kind.activation, **self.keywords}
        if kind.residual == "before":
            outputs = norm(x, residual, *self.own_arguments, *parameters, **keywords)
        else:
            outputs = (norm(x, *self.own_arguments, *parameters, residual=residual, **keywords),)
        operands = (x, residual, *parameters, *keywords.values())
        inputs = [tensor for tensor in operands if isinstance(tensor, Tensor) and tensor.requires_grad]
        torch.autograd.grad(outputs, inputs, [torch.empty_like(output) for output in outputs])

    def _parameters(self) -> list[Tensor | None]:
        count = 1 if self.norm == "rms_norm" else 2
        if self.parameters == "none":
            return [None] * count
        dtype = torch.float32 if "float32" in self.parameters and self.kind.dtype in HALF else self.kind.dtype
        learn = not self.parameters.startswith("frozen")
        return [torch.empty(self.channels, dtype=dtype, requires_grad=learn) for _ in range(count)]


@dataclass(frozen=True)
class RowCall(Call):
    span: int
    subtract_mean: bool
    rows: int = FEW

    @property
    def norm(self) -> str:
        return "layer_norm" if self.subtract_mean else "rms_norm"

    @property
    def size(self) -> str:
        return f"span {self.span}" + ("" if self.rows == FEW else f", {self.rows} rows")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, self.span

    @property
    def own_arguments(self) -> tuple[Any, ...]:
        return ((self.span,),)

    @property
    def channels(self) -> int:
        return self.span


@dataclass(frozen=True)
class ChannelCall(Call):
    planes: Planes
    channels_last: bool

    norm = "group_norm"

    @property
    def size(self) -> str:
        return f"{self.shape} in {self.planes[1]} groups" + (", channels_last" if self.channels_last else "")

    @property
    def shape(self) -> tuple[int, ...]:
        return 2, self.channels, *self.planes[2]

    @property
    def own_arguments(self) -> tuple[Any, ...]:
        return (self.planes[1],)

    @property
    def channels(self) -> int:
        return self.planes[0] * self.planes[1]

    def input(self) -> Tensor:
        return _laid_out(self.shape, self.kind.dtype, self.channels_last)


@dataclass(frozen=True)
class BatchCall(Call):
    sizes: tuple[int, ...]
    channels_last: bool
    training: bool

    norm = "batch_norm"

    @property
    def size(self) -> str:
        return f"{self.sizes}" + (", channels_last" if self.channels_last else "") + (", eval" * (not self.training))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    @property
    def own_arguments(self) -> tuple[Any, ...]:
        return tuple(torch.empty(self.channels) for _ in range(2))

    @property
    def keywords(self) -> dict[str, Any]:
        return {"training": self.training}

    @property
    def channels(self) -> int:
        return self.sizes[1]

    def input(self) -> Tensor:
        return _laid_out(self.sizes, self.kind.dtype, self.channels_last)


@dataclass(frozen=True)
class SwitchCall(BatchCall):
    norm = "switch_norm"

    @property
    def keywords(self) -> dict[str, Any]:
        kinds = 2 if len(self.sizes) == 2 else 3
        weights = {name: torch.empty(kinds, requires_grad=True) for name in ("mean_weight", "var_weight")}
        return {"training": self.training, **weights}


def _laid_out(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    if not channels_last:
        return torch.empty(shape, dtype=dtype)
    samples, channels, *positions = shape
    return torch.empty((samples, *positions, channels), dtype=dtype).movedim(-1, 1)


def kinds() -> Iterator[Kind]:
    """Every type, place of the residual and activation."""
    for dtype, residual, wide in itertools.product(DTYPES, RESIDUALS, (False, True)):
        if not wide or (dtype in HALF and residual == "before"):
            for activation in ACTIVATIONS:
                yield Kind(dtype, activation, residual, wide)


def candidates(kind: Kind) -> Iterator[Call]:
    """Calls of a kind, those with the most operands and of rows the longest spans first."""
    own = PARAMETERS if kind.dtype in HALF else PARAMETERS[1:]
    spans = sorted({span - odd for span in (*WHOLE_ROWS, *LONG_ROWS) for odd in (0, 1)}, reverse=True)
    for parameters, span, subtract_mean in itertools.product(own, spans, (True, False)):
        yield RowCall(kind, parameters, span, subtract_mean)
    # A program walks a row: backward, where no parameter learns.
    walked = [span - odd for span in reversed(WALKED_ROWS) for odd in (0, 1)]
    for parameters, span, subtract_mean in itertools.product(("frozen float32", *own), walked, (True, False)):
        yield RowCall(kind, parameters, span, subtract_mean, MANY)
    for parameters in own:
        yield from (ChannelCall(kind, parameters, planes, False) for planes in (*WHOLE_GROUPS, *CUT_GROUPS))
        yield from (ChannelCall(kind, parameters, planes, True) for planes in CHANNELS_LAST)
        for training in (True, False):
            yield from (BatchCall(kind, parameters, sizes, False, training) for sizes in BATCHES)
            yield from (BatchCall(kind, parameters, sizes, True, training) for sizes in BATCHES_CHANNELS_LAST)
        for sizes, channels_last in MIXED:
            yield SwitchCall(kind, parameters, sizes, channels_last, True)
