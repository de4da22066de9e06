"""One residual add and its gradients, three ways: fused, as torch's own composition, and in NumPy float64.

What a call drops is seen in another of the same seed, shape and rates, of ones that are added to zeros: the reference
and torch's composition are given that mask.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fused_ops import Activation, get_backend, reference
from fused_ops import functional as F
from tests.norm_cases import DEVICE, Result, normal, same_bits, torch_activate
from tests.schedules import forget_schedules
from tests.tolerances import assert_within_budget

Tensor = torch.Tensor
Masks = tuple["Tensor | None", "Tensor | None"]

OPERANDS = ("x", "residual", "scale")
# No slope, a slope of two values, a slope that is computed again.
EACH_KIND = (None, "relu", "gelu")
# Where the scale of an x of shape IMAGE may lie.
IMAGE = (3, 6, 5, 4)
SCALES: list[tuple[int, ...] | None] = [
    None, (), (1,), (4,), (5, 4), (5, 1), (6, 1, 1), (6, 1, 4), (6, 5, 1), (1, 6, 1, 1), (3, 1, 1, 1), (3, 1, 1, 4),
    (3, 6, 1, 1), (3, 1, 5, 1), (3, 6, 5, 1), (1, 6, 5, 4), (1, 1, 1, 1), IMAGE,
]  # fmt: skip


def has_gap(scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether the scale lacks an axis between two of its own: it goes by torch, which draws for itself what to drop."""
    of_x = shape[len(shape) - len(scale) :]
    axes = [dim for dim, size in enumerate(scale) if size != 1]
    return len(axes) > 1 and any(scale[dim] != of_x[dim] for dim in range(axes[0], axes[-1]))


@dataclass(frozen=True, kw_only=True)
class AddCase:
    """The arguments of one call, the seed that it draws from, and the gradient that arrives at y; `frozen` names the
    operands that require no gradient."""

    x: Tensor
    residual: Tensor
    scale: Tensor | None = None
    activation: str | Activation | None = None
    dropout_p: float = 0.0
    drop_path_p: float = 0.0
    dy: Tensor | None = None
    frozen: tuple[str, ...] = ()
    seed: int = 0

    @property
    def drops(self) -> bool:
        return self.dropout_p > 0.0 or self.drop_path_p > 0.0

    @property
    def keywords(self) -> dict[str, Any]:
        return {"activation": self.activation, "dropout_p": self.dropout_p, "drop_path_p": self.drop_path_p}

    @property
    def terms(self) -> int:
        """How many numbers add up to one of dscale."""
        return 1 if self.scale is None else self.x.numel() // max(1, self.scale.numel())

    def leaves(self) -> dict[str, Tensor]:
        """Every operand that is given, with its layout; a tensor that is two operands becomes two leaves."""
        given = {name: getattr(self, name) for name in OPERANDS if getattr(self, name) is not None}
        return {name: tensor.detach().requires_grad_(name not in self.frozen) for name, tensor in given.items()}


def make_case(
    *shape: int,
    scale: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    seed: int = 0,
    **fields: Any,
) -> AddCase:
    """A case of normal numbers; `scale` is the shape of one. A field given by name replaces its own."""
    stream = residual_dtype or dtype
    tensors: dict[str, Any] = {
        "x": normal(*shape, dtype=dtype, seed=seed),
        "residual": normal(*shape, dtype=stream, seed=seed + 1),
        "dy": normal(*shape, dtype=stream, seed=seed + 2),
        "scale": None if scale is None else normal(*scale, dtype=scale_dtype or dtype, seed=seed + 3),
    }
    return AddCase(**{**tensors, "seed": seed + 4, **fields})


def with_exact_sums(case: AddCase) -> AddCase:
    """Without a scale, x and residual as multiples of 1/16, whose sum every type holds: a sum that torch rounds may
    cross a kink, and its error would then allow anything."""
    return replace(case, x=(case.x * 16).round() / 16, residual=(case.residual * 16).round() / 16)


def with_layout(case: AddCase, layout: Callable[[Tensor], Tensor], *names: str) -> AddCase:
    """The case with these of x, residual and dy lain out otherwise, all three if none is named."""
    return replace(case, **{name: layout(getattr(case, name)) for name in names or ("x", "residual", "dy")})


@contextlib.contextmanager
def blocks_of(elements: int) -> Iterator[None]:
    """Programs take so many elements inside, which an interpreter, that is slow by the program, does not mind."""
    from fused_ops.kernels import residual

    usual, residual._block = residual._block, lambda of_what: elements
    try:
        forget_schedules()
        yield
    finally:
        residual._block = usual
        forget_schedules()


# --- functions of the operands -------------------------------------------------------------------------------------


def operands(case: AddCase) -> dict[str, Tensor]:
    """New leaves for one run, by name."""
    return {
        name: leaf.detach().to(DEVICE, copy=True).requires_grad_(leaf.requires_grad)
        for name, leaf in case.leaves().items()
    }


def fused(case: AddCase) -> Callable[..., tuple[Tensor]]:
    """The call as a function of `operands(case).values()`; it drops the same each time."""

    def function(x: Tensor, residual: Tensor, scale: Tensor | None = None) -> tuple[Tensor]:
        if case.drops:
            torch.manual_seed(case.seed)
        return (F.residual_add(x, residual, scale=scale, **case.keywords),)

    return function


def composed(case: AddCase, masks: Masks | None = None) -> Callable[..., tuple[Tensor]]:
    """The same call as torch alone makes it, of what the fused one keeps."""
    keep, keep_path = masks or masks_of(case)

    def function(x: Tensor, residual: Tensor, scale: Tensor | None = None) -> tuple[Tensor]:
        branch = x
        if case.dropout_p > 0.0:
            branch = branch * _noise(keep, case.dropout_p, branch)
        if scale is not None:
            branch = branch * scale
        if case.drop_path_p > 0.0:
            noise = _noise(keep_path, case.drop_path_p, branch)
            branch = branch * noise.view(-1, *[1] * (branch.dim() - 1))
        total = (residual + branch).to(residual.dtype)
        return (torch_activate(total, case.activation),)

    return function


def _noise(mask: Tensor | None, p: float, like: Tensor) -> Tensor:
    """What torch's dropout multiplies by."""
    assert mask is not None
    noise = mask.to(like.device, like.dtype)
    return noise.zero_() if p == 1.0 else noise.div_(1.0 - p)


def factor_of(case: AddCase, **keywords: Any) -> Tensor:
    """What the fused call multiplies each element of x by, without the scale; `keywords` replace its own."""
    torch.manual_seed(case.seed)
    ones, zeros = torch.ones_like(case.x), torch.zeros_like(case.x, dtype=case.residual.dtype)
    rates = {"dropout_p": case.dropout_p, "drop_path_p": case.drop_path_p, **keywords}
    with torch.no_grad():
        return F.residual_add(ones, zeros, **rates)


def masks_of(case: AddCase) -> Masks:
    """Which elements and which samples the fused call keeps; of a sample that loses every element, either is right."""
    if not case.drops:
        return None, None
    if get_backend() == "triton":
        return _masks_of_kernels(tuple(case.x.shape), case.seed, case.dropout_p, case.drop_path_p)
    return _split(factor_of(case))


def _split(factor: Tensor) -> tuple[Tensor, Tensor]:
    keep = factor != 0.0
    return keep, keep.flatten(1).any(1) if keep.dim() > 1 else keep.clone()


@functools.cache
def _masks_of_kernels(shape: tuple[int, ...], seed: int, dropout_p: float, drop_path_p: float) -> tuple[Tensor, Tensor]:
    """Which depend, as tests have it, on nothing else."""
    torch.manual_seed(seed)
    ones, zeros = torch.ones(shape, device=DEVICE), torch.zeros(shape, device=DEVICE)
    return _split(F.residual_add(ones, zeros, dropout_p=dropout_p, drop_path_p=drop_path_p))


# --- three ways ----------------------------------------------------------------------------------------------------


def _collect(case: AddCase, function: Callable[..., tuple[Tensor]]) -> Result:
    leaves = case.leaves()
    (y,) = function(*leaves.values())
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients: dict[str, Tensor | None] = {f"d{name}": None for name in leaves}
    if wanted and case.dy is not None:
        found = torch.autograd.grad(y, list(wanted.values()), case.dy)
        gradients.update({f"d{name}": gradient for name, gradient in zip(wanted, found, strict=True)})
    return Result({"y": y.detach()}, gradients)


def run_fused(case: AddCase) -> Result:
    """The call of fused_ops.functional, under whichever backend is set."""
    return _collect(case, fused(case))


def run_torch(case: AddCase, masks: Masks | None = None) -> Result:
    """torch eager's composition of the same call."""
    return _collect(case, composed(case, masks))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().resolve_neg().double().cpu().numpy()


def run_reference(case: AddCase, masks: Masks | None = None) -> Result:
    """The specification, in float64, on the numbers that the operands hold."""
    keep, keep_path = (None if mask is None else mask.cpu().numpy() for mask in masks or masks_of(case))
    arrays = {name: _array(leaf) for name, leaf in case.leaves().items()}
    keywords = {**case.keywords, "keep": keep, "keep_path": keep_path, "scale": arrays.get("scale")}
    operands = (arrays["x"], arrays["residual"])
    gradients = {}
    if case.dy is not None:
        gradients = reference.residual_add_backward(_array(case.dy), *operands, **keywords)
    y = torch.as_tensor(reference.residual_add(*operands, **keywords))
    return Result({"y": y}, {name: torch.as_tensor(array) for name, array in gradients.items()})


def check(case: AddCase) -> Result:
    """Runs the call and its gradients and holds every result to its budget, type and shape, y to x's layout; returns
    the results. No argument may change, and no gradient may arrive where none was asked for."""
    given = {name: tensor for name in (*OPERANDS, "dy") if (tensor := getattr(case, name)) is not None}
    before = {name: tensor.resolve_neg().clone() for name, tensor in given.items()}
    actual = run_fused(case)
    for name, tensor in before.items():
        assert same_bits(getattr(case, name).resolve_neg(), tensor), f"residual_add changed its argument {name}"
    y = actual.outputs["y"]
    assert y.numel() == 0 or y.stride() == torch.empty_like(case.x).stride(), (
        f"y lies {y.stride()}, x {case.x.stride()}"
    )

    masks = masks_of(case)
    eager, expected = run_torch(case, masks), run_reference(case, masks)
    for name, output in actual.everything().items():
        of_torch = eager.everything()[name]
        assert (output is None) == (of_torch is None), f"{name}: {output} where torch has {of_torch}"
        if output is None or of_torch is None:
            continue
        assert (output.dtype, output.shape) == (of_torch.dtype, of_torch.shape), name
        want = expected.everything()[name]
        assert want is not None
        assert_within_budget(name, output, of_torch, want, case.terms if name == "dscale" else 1)
    return actual
