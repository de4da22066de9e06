"""``python -m fused_ops``: versions, devices, the backend each gets and why, and a check of every function.

The first thing to ask of a user who reports a fault. Exits with 1 where a result is wrong.
"""

from __future__ import annotations

import math
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from . import __version__, backend, functional, reference

ROWS, SPAN = 64, 768
IMAGES = (2, 24, 7, 9)  # samples, channels, positions
KINDS = 3  # of the statistics that a switchable norm mixes
RUNNING = ("running_mean", "running_var")


class Case(NamedTuple):
    """One function: x's shape and the parameters', which operands it takes, its own arguments after x and the residual,
    and by name, and whether the residual is added first."""

    function: str
    shape: tuple[int, ...]
    parameters: tuple[int, ...]
    operands: tuple[str, ...]
    arguments: tuple[Any, ...] = ()
    named: Mapping[str, Any] = {"eps": 1e-5, "activation": "gelu"}
    adds_first: bool = False

    @property
    def label(self) -> str:
        """The function, and whether it normalizes by running statistics."""
        return self.function if self.named.get("training", True) else f"{self.function}, eval"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what the reference returns."""
        running = RUNNING if RUNNING[0] in self.operands else ()
        return ("y", "total", *running) if self.adds_first else ("y", *running)


EVERY = ("x", "residual", "weight", "bias")
OF_BATCH = (*EVERY, *RUNNING)
OF_MIXTURE = (*OF_BATCH, "mean_weight", "var_weight")
TRAINING, EVAL = ({"training": training, "eps": 1e-5, "activation": "gelu"} for training in (True, False))
CASES = (
    Case("layer_norm", (ROWS, SPAN), (SPAN,), EVERY, ((SPAN,),)),
    Case("rms_norm", (ROWS, SPAN), (SPAN,), ("x", "residual", "weight"), ((SPAN,),)),
    Case("group_norm", IMAGES, (IMAGES[1],), EVERY, (4,)),
    Case("instance_norm", IMAGES, (IMAGES[1],), EVERY),
    Case("batch_norm", IMAGES, (IMAGES[1],), OF_BATCH, named=TRAINING),
    Case("batch_norm", IMAGES, (IMAGES[1],), OF_BATCH, named=EVAL),
    Case("switch_norm", IMAGES, (IMAGES[1],), OF_MIXTURE, named=TRAINING),
    Case("switch_norm", IMAGES, (IMAGES[1],), OF_MIXTURE, named=EVAL),
    Case("add_layer_norm", (ROWS, SPAN), (SPAN,), EVERY, ((SPAN,),), adds_first=True),
    Case("add_rms_norm", (ROWS, SPAN), (SPAN,), ("x", "residual", "weight"), ((SPAN,),), adds_first=True),
    Case("add_group_norm", IMAGES, (IMAGES[1],), EVERY, (4,), adds_first=True),
    Case("add_instance_norm", IMAGES, (IMAGES[1],), EVERY, adds_first=True),
    Case("add_batch_norm", IMAGES, (IMAGES[1],), OF_BATCH, named=TRAINING, adds_first=True),
    Case("add_switch_norm", IMAGES, (IMAGES[1],), OF_MIXTURE, named=TRAINING, adds_first=True),
    Case("residual_add", (ROWS, SPAN), (SPAN,), ("x", "residual", "scale"), named={"activation": "gelu"}),
    Case("weight_standardize", (ROWS, 16, 3, 3), (), ("x",), named={"eps": 1e-5}),
)


class Check(NamedTuple):
    """The largest error of one output against the reference, and what it may be."""

    output: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def _call(function: Callable[..., Any], case: Case, operands: Mapping[str, Any], before: Sequence[Any] = ()) -> tuple:
    """Calls a function of `functional` or `reference` on a case's operands; the result always as a tuple."""
    operands = dict(operands)
    positional = [*before, operands.pop("x")]
    if case.adds_first:
        positional.append(operands.pop("residual"))
    result = function(*positional, *case.arguments, **case.named, **operands)
    return result if isinstance(result, tuple) else (result,)


def run_case(case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Forward and backward of one function on one device, each output and gradient against float64 NumPy.

    An output may be 8 roundings of its type away, at the size of its largest element: a few for the arithmetic and, for
    sums, the root of the number of rows. The gradients of a mixture's weights are sums over all of x, of terms of about
    1 that may cancel: to them two float32 roundings of a term are allowed beside, times the root of their number.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": case.shape, "residual": case.shape, "mean_weight": (KINDS,), "var_weight": (KINDS,)}
    values = {
        name: torch.randn(shapes.get(name, case.parameters), generator=generator).to(dtype) for name in case.operands
    }
    if "running_var" in values:
        values["running_var"] = values["running_var"].abs() + 0.5
    if "mean_weight" in values:
        # Of planes that are all alike the gradients of the shares are small differences of large sums.
        scale, offset = torch.randn(2, *case.shape[:2], 1, 1, generator=generator)
        values["x"] = (values["x"] * (1 + scale.abs()) + 2 * offset).to(dtype)
    cotangents = [torch.randn(case.shape, generator=generator).to(dtype) for _ in range(1 + case.adds_first)]

    tensors = {name: value.to(device, copy=True) for name, value in values.items()}
    learned = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name not in RUNNING}
    outputs = _call(getattr(functional, case.function), case, tensors)
    torch.autograd.backward(outputs, [cotangent.to(device) for cotangent in cotangents])

    arrays = {name: value.double().numpy() for name, value in values.items()}
    expected = dict(zip(case.outputs, _call(getattr(reference, case.function), case, arrays), strict=True))
    before = [cotangent.double().numpy() for cotangent in cotangents]
    (gradients,) = _call(getattr(reference, f"{case.function}_backward"), case, arrays, before)
    expected |= gradients
    if case.function == "weight_standardize":  # whose x is a weight
        expected["dx"] = expected.pop("dweight")
    actual = dict(zip(case.outputs, outputs, strict=False))
    actual |= {name: tensors[name] for name in RUNNING if name in tensors}  # which have been moved in place
    actual |= {f"d{name}": tensor.grad for name, tensor in learned.items()}
    for name, tensor in actual.items():
        want = np.asarray(expected[name])
        error = np.abs(tensor.detach().double().cpu().numpy() - want).max()
        allowed = 4 * torch.finfo(dtype).eps * float(np.abs(want).max())
        if name in ("dmean_weight", "dvar_weight"):
            allowed += torch.finfo(torch.float32).eps * math.sqrt(math.prod(case.shape))
        yield Check(name, float(error), allowed)


def devices() -> list[torch.device]:
    """Every device that a call could run on here."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def describe(device: torch.device) -> str:
    """A device's name, and the backend that it gets, with the reason."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{device} ({name}): {backend.explain(device)}"


def versions() -> str:
    """What is installed, in one line."""
    return (
        f"fused_ops {__version__}, torch {torch.__version__}, triton {backend.TRITON_VERSION or 'absent'}, "
        f"numpy {np.__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    )


def main() -> int:
    """Prints the report; 1 where anything in it is wrong."""
    print(versions())
    failures = 0
    for device in devices():
        print(f"\n{describe(device)}")
        for case in CASES:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                label = f"  {case.label:20}{str(dtype).removeprefix('torch.'):10}"
                try:
                    checks = list(run_case(case, device, dtype))
                except Exception:
                    failures += 1
                    print(f"{label}FAILED\n{traceback.format_exc()}")
                    continue
                wrong = [check for check in checks if not check.passed]
                failures += len(wrong)
                worst = max(checks, key=lambda check: check.error / check.allowed)
                shown = wrong or [worst]
                details = ", ".join(f"{c.output}: error {c.error:.1e}, allowed {c.allowed:.1e}" for c in shown)
                print(f"{label}{'WRONG   ' if wrong else 'ok      '}{details}")
    print(f"\n{'everything agrees with the NumPy reference' if not failures else f'{failures} results are wrong'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
