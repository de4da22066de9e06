"""One call of a norm and its gradients, three ways: fused, as torch's own composition, and in NumPy float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as TF

import fused_ops
from fused_ops import Activation, reference
from fused_ops import functional as F
from tests.tolerances import assert_within_budget, largest_error, rounding

Tensor = torch.Tensor

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPERANDS = ("x", "residual", "weight", "bias")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

TORCH_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": TF.relu,
    "relu6": TF.relu6,
    "leaky_relu": TF.leaky_relu,
    "elu": TF.elu,
    "selu": TF.selu,
    "gelu": TF.gelu,
    "gelu_tanh": functools.partial(TF.gelu, approximate="tanh"),
    "silu": TF.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": TF.mish,
    "hardswish": TF.hardswish,
    "hardsigmoid": TF.hardsigmoid,
    "softplus": TF.softplus,
}


def short(value: Any) -> str:
    """A test id: bfloat16, leaky_relu, 2x3x4."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers on DEVICE, the same for every type and device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def torch_activate(z: Tensor, activation: str | Activation | None) -> Tensor:
    if activation is None:
        return z
    activation = Activation(activation) if isinstance(activation, str) else activation
    return TORCH_ACTIVATIONS[activation.name](z, **activation.parameters)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The arguments of one call, with the gradients that arrive at its outputs; a subclass says which norm it is.

    `function` is one of fused_ops.functional; `frozen` names the operands that require no gradient. What is dropped at
    the rate dropout_p follows from drop_seed.
    """

    function: str
    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    activation: str | Activation | None = None
    dy: Tensor | None = None
    dtotal: Tensor | None = None
    frozen: tuple[str, ...] = ()
    dropout_p: float = 0.0
    drop_seed: int = 0

    @property
    def adds_first(self) -> bool:
        return self.function.startswith("add_")

    @property
    def takes_bias(self) -> bool:
        return "rms" not in self.function

    @property
    def own_arguments(self) -> tuple:
        """What the norm takes between the residual and the weight."""
        raise NotImplementedError

    @property
    def statistics(self) -> int:
        """How many means the call takes."""
        raise NotImplementedError

    @property
    def mask_shape(self) -> tuple[int, int]:
        """Of a bit an element: the runs of neighbours in memory, and the bytes of each."""
        raise NotImplementedError

    @property
    def terms(self) -> int:
        """How many numbers add up to one of dweight."""
        raise NotImplementedError

    def torch_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """torch's own norm of operands of one type."""
        raise NotImplementedError

    def for_torch(self) -> Case:
        """The case in layouts in which torch's own norm is as good as it can be."""
        return self

    def leaves(self) -> dict[str, Tensor]:
        """Every operand that is given, with its layout; a tensor that is two operands becomes two leaves."""
        given = {name: getattr(self, name) for name in OPERANDS if getattr(self, name) is not None}
        return {name: tensor.detach().requires_grad_(name not in self.frozen) for name, tensor in given.items()}

    def arguments(self, leaves: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) as the function of fused_ops.functional, and of fused_ops.reference, takes them."""
        args = (leaves["x"], *((leaves["residual"],) if self.adds_first else ()), *self.own_arguments)
        kwargs: dict[str, Any] = {"weight": leaves.get("weight"), "activation": self.activation, "eps": self.eps}
        if self.takes_bias:
            kwargs["bias"] = leaves.get("bias")
        if not self.adds_first:
            kwargs["residual"] = leaves.get("residual")
        if self.dropout_p:
            kwargs["dropout_p"] = self.dropout_p
            if isinstance(leaves["x"], np.ndarray):  # the reference's
                kwargs["keep"] = self.keep().cpu().numpy()
        return args, kwargs

    def call(self, leaves: dict[str, Any]) -> Any:
        """The function of fused_ops.functional, which drops the same each time."""
        args, kwargs = self.arguments(leaves)
        if self.dropout_p:
            torch.manual_seed(self.drop_seed)
        return getattr(F, self.function)(*args, **kwargs)

    def keep(self) -> Tensor:
        """Which elements of x the kernels keep: those that any other call of this seed, shape and rate keeps."""
        torch.manual_seed(self.drop_seed)
        ones, zeros = (fill(self.x.shape, device=DEVICE) for fill in (torch.ones, torch.zeros))
        with torch.no_grad(), fused_ops.use_backend("triton"):
            return F.residual_add(ones, zeros, dropout_p=self.dropout_p) != 0.0

    def noise(self) -> Tensor:
        """What torch's dropout multiplies x by."""
        noise = self.keep().to(self.x.dtype)
        return noise.zero_() if self.dropout_p == 1.0 else noise.div_(1.0 - self.dropout_p)


@dataclass(frozen=True)
class Result:
    """Outputs, and the gradient of every operand that is given; None where none arrived."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]

    def everything(self) -> dict[str, Tensor | None]:
        return {**self.outputs, **self.gradients}


def drawn(
    function: str,
    shape: tuple[int, ...],
    parameter_shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
    residual: bool = False,
    affine: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Normal numbers for the tensors of a case; `parameters` is the type of weight and bias where it is not x's.

    The residual is there where it is asked for or the function adds it first.
    """
    draw = functools.partial(normal, dtype=dtype)
    adds = function.startswith("add_")
    generated: dict[str, Any] = {"x": draw(*shape, seed=seed), "dy": draw(*shape, seed=seed + 1)}
    if residual or adds:
        generated["residual"] = draw(*shape, seed=seed + 2)
    if adds:
        generated["dtotal"] = draw(*shape, seed=seed + 3)
    if affine:
        generated["weight"] = normal(*parameter_shape, dtype=parameters or dtype, seed=seed + 4)
        if "rms" not in function:
            generated["bias"] = normal(*parameter_shape, dtype=parameters or dtype, seed=seed + 5)
    return generated


def with_exact_sums(case: Case) -> Case:
    """x and residual as multiples of 1/16, whose sum every type holds: a total that is rounded may cross a kink."""
    if case.residual is None:
        return case
    return replace(case, x=(case.x * 16).round() / 16, residual=(case.residual * 16).round() / 16)


def _collect(case: Case, leaves: dict[str, Tensor], outputs: Any) -> Result:
    named = dict(zip(("y", "total"), outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
    arrived = {name: d for name, d in (("y", case.dy), ("total", case.dtotal)) if d is not None and name in named}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients: dict[str, Tensor | None] = {f"d{name}": None for name in leaves}
    used = [name for name in arrived if named[name].requires_grad]
    if wanted and used:
        found = torch.autograd.grad(
            [named[name] for name in used],
            list(wanted.values()),
            [arrived[name] for name in used],
            allow_unused=True,
        )
        gradients.update({f"d{name}": gradient for name, gradient in zip(wanted, found, strict=True)})
    return Result({name: output.detach() for name, output in named.items()}, gradients)


def run_fused(case: Case) -> Result:
    """The call of fused_ops.functional, under whichever backend is set."""
    leaves = case.leaves()
    return _collect(case, leaves, case.call(leaves))


def torch_expression(case: Case, leaves: dict[str, Tensor]) -> Any:
    """What a user of torch.nn.functional writes for the call, in x's type; in a wider one where the types are mixed."""
    x, residual = leaves["x"], leaves.get("residual")
    weight, bias = leaves.get("weight"), leaves.get("bias")
    total = None
    if case.dropout_p:
        x = x * case.noise()
    if case.adds_first:
        total = residual + x
    z = x if total is None else total
    wide = functools.reduce(torch.promote_types, [t.dtype for t in (z, weight, bias) if t is not None])
    given = [t.dtype for t in (weight, bias) if t is not None]
    if "rms" not in case.function and z.dtype in HALF and not z.is_cuda and given == [torch.float32] * 2:
        wide = z.dtype  # the one mixture that torch takes as it is
    else:
        weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    y = case.torch_norm(z.to(wide), weight, bias)
    y = y.to(x.dtype)
    if total is None and residual is not None:
        y = y + residual
    y = torch_activate(y, case.activation)
    return y if total is None else (y, total)


def run_torch(case: Case) -> Result:
    """torch eager's composition of the same call."""
    case = case.for_torch()
    leaves = case.leaves()
    return _collect(case, leaves, torch_expression(case, leaves))


def run_reference(case: Case) -> Result:
    """The specification, in float64, on the numbers that the operands hold."""
    arrays = {name: leaf.detach().double().cpu().numpy() for name, leaf in case.leaves().items()}
    args, kwargs = case.arguments(arrays)
    outputs = getattr(reference, case.function)(*args, **kwargs)
    arrived = [None if d is None else d.double().cpu().numpy() for d in (case.dy, case.dtotal)]
    gradients: dict[str, Any] = {}
    if any(d is not None for d in arrived):
        backward = getattr(reference, f"{case.function}_backward")
        gradients = backward(*(arrived if case.adds_first else arrived[:1]), *args, **kwargs)
    named = dict(zip(("y", "total"), outputs if isinstance(outputs, tuple) else (outputs,), strict=False))
    tensors = {name: torch.as_tensor(array) for name, array in gradients.items()}
    return Result({name: torch.as_tensor(array) for name, array in named.items()}, tensors)


def check(case: Case) -> Result:
    """Runs the call and its gradients and holds every result to its budget, type and shape; returns the results.

    No argument may change, and no gradient may arrive where none was asked for.
    """
    before = {
        name: tensor.clone() for name in (*OPERANDS, "dy", "dtotal") if (tensor := getattr(case, name)) is not None
    }
    actual = run_fused(case)
    for name, tensor in before.items():
        assert same_bits(getattr(case, name), tensor), f"{case.function} changed its argument {name}"

    eager, expected = run_torch(case), run_reference(case)
    assert actual.outputs.keys() == eager.outputs.keys()
    for name, output in actual.everything().items():
        of_torch = eager.everything()[name]
        assert (output is None) == (of_torch is None), f"{name}: {output} where torch has {of_torch}"
        if output is None:
            continue
        assert (output.dtype, output.shape) == (of_torch.dtype, of_torch.shape), name
        of_parameter = name in ("dweight", "dbias")
        terms = case.terms if of_parameter else 1
        # With a residual they may be summed from the dresidual that was stored, as torch's are.
        stored = case.x.dtype if of_parameter and case.residual is not None else None
        exact = expected.everything()[name]
        if name in ("dx", "dresidual") and output.is_cuda and not exact.any():
            # A row of one value: a product that is rounded less one that a multiply-add does not round.
            roundings = rounding(torch.promote_types(case.x.dtype, torch.float32)) * case.eps**-0.5
            assert largest_error(output, exact) <= 16 * roundings, (case.function, name)
            continue
        assert_within_budget(f"{case.function} {name}", output, of_torch, exact, terms, stored)
    return actual


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Equality of type, shape and every bit, NaN payloads and the signs of zeros included."""
    if a is None or b is None:
        return a is b
    bits = [tensor.detach().view(_INTEGERS[tensor.element_size()]) for tensor in (a, b)]
    return a.dtype == b.dtype and torch.equal(*bits)


def assert_same_bits(actual: Result, expected: Result) -> None:
    """Every output and gradient of two results agrees in every bit."""
    others = expected.everything()
    assert actual.everything().keys() == others.keys()
    different = [name for name, tensor in actual.everything().items() if not same_bits(tensor, others[name])]
    assert not different, f"{different} differ in their bits"


with_fields = replace
