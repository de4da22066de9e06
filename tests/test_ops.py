"""The torch.library ops, and everything that traces them: fake tensors, meta tensors, make_fx, export."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fused_ops
from fused_ops import Activation
from tests.calls import as_tuple, composed, fused, gradients, operands, scalar
from tests.channel_norm_cases import make_case as make_channel_case
from tests.channel_norm_cases import with_layout
from tests.every_norm import FUNCTIONS, PLACES, functions, small_case
from tests.layouts import channels_last
from tests.norm_cases import DEVICE, OPERANDS, Case, normal
from tests.row_norm_cases import FUNCTIONS as ROW_FUNCTIONS
from tests.row_norm_cases import make_case

pytest.importorskip("triton", reason="Triton is not installed, so there are no ops")

from fused_ops import ops
from fused_ops.kernels.problem import GroupNorm, RowNorm

Tensor = torch.Tensor

# torch's own, as it first loads what it exports with.
pytestmark = [
    pytest.mark.one_in(8),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]

LEAKY = Activation("leaky_relu", negative_slope=0.2)
NAMES = ("row_norm_forward", "row_norm_backward", "group_norm_forward", "group_norm_backward")
FORWARD, BACKWARD, GROUP_FORWARD, GROUP_BACKWARD = (getattr(torch.ops.fused_ops, name).default for name in NAMES)
SAMPLES = [
    pytest.param(name, *sample, id=f"{name}-{index}", marks=[] if index % every == 0 else pytest.mark.full)
    for name, every in zip(NAMES, (3, 3, 11, 11), strict=True)
    for index, sample in enumerate(ops.sample_inputs(name, DEVICE))
]


def ops_of(function: str) -> list[Any]:
    """The forward and the backward op that a function shows."""
    return [FORWARD, BACKWARD] if function in ROW_FUNCTIONS else [GROUP_FORWARD, GROUP_BACKWARD]


# --- the ops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "args", "kwargs"), SAMPLES)
def test_opcheck(name, args, kwargs):
    torch.library.opcheck(getattr(torch.ops.fused_ops, name), args, kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_every_optional_tensor_and_every_flag_both_ways(name):
    schema = getattr(torch.ops.fused_ops, name).default._schema
    seen: dict[str, set[Any]] = {argument.name: set() for argument in schema.arguments}
    for args, kwargs in ops.sample_inputs(name, DEVICE):
        assert len(args) == len(schema.arguments) and not kwargs
        for argument, value in zip(schema.arguments, args, strict=True):
            seen[argument.name].add(value if isinstance(value, bool) else value is None)
    both_ways = [a.name for a in schema.arguments if isinstance(a.type, torch.OptionalType | torch.BoolType)]
    # dx is wanted in every sample, and backward always has something to read.
    assert {name for name in both_ways if seen[name] != {True, False}} <= {"wants_dx", "x", "mean", "rstd"}


def test_an_unknown_op_has_no_samples():
    with pytest.raises(ValueError, match="unknown op 'row_norm'; known are row_norm_forward, row_norm_backward"):
        next(ops.sample_inputs("row_norm"))


@pytest.mark.parametrize("case", [make_case("layer_norm", 0, 2, 3, dims=2, residual=True, activation="relu")])
def test_an_op_without_rows_is_as_its_fake_says(case):
    """Two dims of parameters, none contiguous: their gradients are flat all the same."""
    case = replace(case, weight=normal(3, 2).t(), bias=normal(3, 2).t())
    x, residual, weight, bias = operands(case).values()
    norm = RowNorm(6, 1e-5, True, False, "relu")
    torch.library.opcheck(FORWARD, (x, residual, weight, bias, *norm, True, True))
    empty = x.new_empty(0), x.new_empty((0, 1), dtype=torch.uint8)
    saved = (x.detach(), None, empty[1], weight.detach(), bias.detach(), empty[0], empty[0])
    torch.library.opcheck(BACKWARD, (x.detach(), None, *saved, *norm, True, True, True, True))


# Nobody writes, and nobody reads, the statistics of planes without positions: eager's and a tracer's are not the same.
NO_ELEMENTS = {
    (0, 4, 3): ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    (2, 4, 0): ("test_schema", "test_faketensor"),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", NO_ELEMENTS)
def test_a_group_norm_op_without_elements_is_as_its_fake_says(shape, last):
    x, parameter = normal(*shape), normal(4)
    norm = GroupNorm(2, last, 1e-5, False, "relu")
    forward = (x, x.clone(), parameter, parameter.clone(), *norm, True, True)
    torch.library.opcheck(GROUP_FORWARD, forward, test_utils=NO_ELEMENTS[shape])
    _, _, mean, rstd, bits = GROUP_FORWARD(*forward)
    saved = (x.clone(), None, bits, parameter, parameter.clone(), mean, rstd)
    torch.library.opcheck(GROUP_BACKWARD, (x, None, *saved, *norm, True, True, True, True))


@pytest.mark.parametrize(("function", "residual"), PLACES)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_an_op_called_for_inference_has_right_gradients_nonetheless(function, residual, activation, triton_backend):
    """A graph that was traced without gradients asks for no statistics, and may yet be run with them."""
    case = small_case(function, dtype=torch.float64, residual=residual, activation=activation)
    traced = make_fx(fused(case))(*(tensor.detach() for tensor in operands(case).values()))
    torch.testing.assert_close(gradients(traced, operands(case)), gradients(composed(case), operands(case)))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_an_op_of_mixed_types_is_as_its_fake_says(half):
    """x and y of half precision, the stream and its gradient float32, and parameters that differ from both."""
    x, weight, bias = normal(3, 8, dtype=half), normal(8, dtype=torch.float64), normal(8, dtype=half)
    norm = RowNorm(8, 1e-5, True, True, "gelu")
    forward = (x, normal(3, 8, seed=1), weight, bias, *norm, True, False)
    torch.library.opcheck(FORWARD, forward)
    _, total, mean, rstd, _ = FORWARD(*forward)
    arriving = (normal(3, 8, dtype=half, seed=2), normal(3, 8, seed=3))
    torch.library.opcheck(BACKWARD, (*arriving, total, None, None, weight, bias, mean, rstd, *norm, *[True] * 4))


@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [None, pytest.param("gelu", marks=pytest.mark.full)])
@pytest.mark.parametrize("half", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
def test_a_group_norm_op_of_mixed_types_is_as_its_fake_says(half, activation, layout):
    """The launchers return each gradient in its own type, and do not leave that to autograd, which would convert."""
    x, weight, bias = layout(normal(2, 4, 5, dtype=half)), normal(4, dtype=torch.float64), normal(4, dtype=half)
    norm = GroupNorm(2, layout is channels_last, 1e-5, True, activation)
    forward = (x, layout(normal(2, 4, 5, seed=1)), weight, bias, *norm, True, False)
    torch.library.opcheck(GROUP_FORWARD, forward)
    _, total, mean, rstd, _ = GROUP_FORWARD(*forward)
    arriving = (layout(normal(2, 4, 5, dtype=half, seed=2)), layout(normal(2, 4, 5, seed=3)))
    torch.library.opcheck(GROUP_BACKWARD, (*arriving, total, None, None, weight, bias, mean, rstd, *norm, *[True] * 4))


def test_statistics_of_an_op_carry_no_gradient():
    x = torch.ones(2, 4, device=DEVICE, requires_grad=True)
    y, _, mean, rstd, bits = FORWARD(x, x, None, None, *RowNorm(4, 1e-5, True, False, "relu"), True, True)
    assert [t.requires_grad for t in (y, mean, rstd, bits)] == [True, False, False, False]


# --- fake and meta tensors -----------------------------------------------------------------------------------------


def layouts(function: str) -> dict[str, Case]:
    """Calls in every layout and mixture of types that decides the type or strides of a result."""
    case = make_case(function, 4, 2, 6, residual=True, activation="gelu")
    weight = normal(2, 6)
    cases = {
        "contiguous": case,
        "transposed": replace(case, x=normal(2, 4, 6).transpose(0, 1), dy=normal(6, 2, 4).permute(2, 1, 0)),
        "expanded": replace(case, residual=normal(1, 1, 6).expand(4, 2, 6), dy=normal(1).expand(4, 2, 6)),
        "two dims, a transposed weight": replace(case, normalized_shape=(2, 6), weight=weight, bias=None),
        "no rows": make_case(function, 0, 2, 6, dims=2, residual=True, activation="relu"),
        "no span": make_case(function, 3, 0, residual=True),
        "half with float32 parameters": make_case(
            function, 4, 6, dtype=torch.bfloat16, parameters=torch.float32, residual=True, activation="relu"
        ),
        "float64": make_case(function, 4, 6, dtype=torch.float64, residual=True),
    }
    if "layer" in function:
        transposed = normal(6, 2).t()
        cases["two dims, a transposed weight"] = replace(case, normalized_shape=(2, 6), weight=transposed, bias=weight)
    if function.startswith("add_"):
        half = make_case(function, 4, 6, dtype=torch.float16)
        cases["half with a float32 stream"] = replace(half, residual=half.residual.float(), dtotal=half.dtotal.float())
    return cases


def channel_layouts(function: str) -> dict[str, Case]:
    """The same of the channel norms."""

    def made(*shape: int, **fields: Any) -> Case:
        return make_channel_case(function, *shape, groups=2, residual=True, **{"activation": "relu", **fields})

    case = made(2, 4, 3, 5)
    cases = {
        "contiguous": case,
        "channels_last": with_layout(case, channels_last),
        "x alone channels_last": with_layout(case, channels_last, "x"),
        "all but x channels_last": with_layout(case, channels_last, "residual", "dy", "dtotal"),
        "channels_last_3d": with_layout(made(2, 4, 2, 3, 2), channels_last),
        "samples apart": with_layout(case, lambda tensor: torch.stack([tensor, tensor], 1)[:, 0]),
        "transposed": with_layout(case, lambda tensor: tensor.mT.contiguous().mT),
        "expanded": replace(case, x=normal(1, 4, 1, 5).expand(2, 4, 3, 5), dy=normal(1).expand(2, 4, 3, 5)),
        "no samples": made(0, 4, 3),
        "no positions": made(2, 4, 0),
        "half with float32 parameters": with_layout(
            made(2, 4, 3, dtype=torch.bfloat16, parameters=torch.float32), channels_last
        ),
        "float64": made(2, 4, 3, dtype=torch.float64, activation=None),
    }
    if function.startswith("add_"):
        half = with_layout(made(2, 4, 3, dtype=torch.float16), channels_last)
        cases["half with a float32 stream"] = replace(half, residual=half.residual.float(), dtotal=half.dtotal.float())
    return cases


LESS_QUICK = ("group_norm", "add_instance_norm")
LAYOUTS = [
    pytest.param(case, id=f"{function}-{layout}", marks=pytest.mark.full if function in LESS_QUICK else [])
    for function in FUNCTIONS
    for layout, case in (layouts if function in ROW_FUNCTIONS else channel_layouts)(function).items()
]


def described(tensors: Any) -> list[tuple]:
    """Shapes and types, and with the kernels strides: torch's own fakes of a gradient differ from it in theirs."""
    strides = fused_ops.get_backend() == "triton"
    return [(tuple(t.shape), t.dtype, t.stride() if t.numel() and strides else None) for t in tensors]


def call_and_gradients(case: Case, tensors: dict[str, Tensor], arriving: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = fused(case)(*tensors.values())
    found = torch.autograd.grad(outputs, list(tensors.values()), arriving)
    return *outputs, *found


@pytest.mark.parametrize("case", LAYOUTS)
def test_fake_tensors_are_as_the_real_ones(case, each_backend):
    def arriving() -> list[Tensor]:
        return [d.to(DEVICE) for d in (case.dy, case.dtotal) if d is not None]

    leaves = {name: leaf.to(DEVICE).detach().requires_grad_() for name, leaf in case.leaves().items()}
    real = call_and_gradients(case, leaves, arriving())
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(leaf) for name, leaf in leaves.items()}
        fake = call_and_gradients(case, fakes, [mode.from_tensor(d) for d in arriving()])
    assert described(fake) == described(real)


@pytest.mark.parametrize("case", LAYOUTS)
def test_meta_tensors_are_as_the_real_ones(case, each_backend):
    real = fused(case)(*operands(case).values())
    on_meta = fused(case)(*(tensor.to("meta") for tensor in operands(case).values()))
    assert all(output.is_meta for output in on_meta)
    assert described(on_meta) == described(real)


# --- graphs --------------------------------------------------------------------------------------------------------


def targets(graph_module: torch.fx.GraphModule) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@functions("instance_norm", "add_group_norm")
def test_make_fx_sees_one_op_each_way(function, tracing_mode, each_backend):
    case = small_case(function, 3, 8, residual=True, activation="gelu")

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = fused(case)(*tensors)
        return *outputs, *torch.autograd.grad(scalar(outputs), tensors)

    tensors = tuple(operands(case).values())
    graph = make_fx(step, tracing_mode=tracing_mode)(*tensors)
    shown = [target for target in targets(graph) if "fused_ops" in str(target)]
    assert shown == (ops_of(function) if each_backend == "triton" else [])
    torch.testing.assert_close(graph(*tensors), step(*tensors), rtol=0, atol=0)
    if tracing_mode == "symbolic":
        more = tuple(operands(small_case(function, 5, 8, residual=True, seed=7)).values())
        torch.testing.assert_close(graph(*more), step(*more), rtol=0, atol=0)


def test_a_dispatch_mode_sees_the_op(triton_backend):
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    case = make_case("add_layer_norm", 3, 8)
    with Recorder():
        recorded = gradients(fused(case), operands(case))
    assert seen.count(FORWARD) == seen.count(BACKWARD) == 1
    torch.testing.assert_close(recorded, gradients(fused(case), operands(case)), rtol=0, atol=0)


@functions("instance_norm", "add_group_norm")
def test_a_backward_may_be_traced_whose_forward_was_not(function, triton_backend):
    case = small_case(function, 3, 8, residual=True, activation="gelu")
    tensors = operands(case)
    outputs = fused(case)(*tensors.values())

    def backward(*arriving: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, list(tensors.values()), arriving, retain_graph=True)

    graph = make_fx(backward)(*(torch.ones_like(output) for output in outputs))
    assert ops_of(function)[1] in targets(graph)
    arriving = [output.detach().cos() for output in outputs]
    torch.testing.assert_close(graph(*arriving), backward(*arriving), rtol=0, atol=0)


class Wrapped(torch.Tensor):
    """A tensor of somebody's own, without memory: what it holds is known to torch's operations alone."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=held.device, strides=held.stride()
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrapped = tree_map_only(cls, lambda tensor: tensor.held, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, function(*unwrapped[0], **unwrapped[1]))


@pytest.mark.parametrize("function", ["layer_norm", "group_norm", "instance_norm"])
@pytest.mark.parametrize("wrapped", OPERANDS)
def test_a_tensor_subclass_in_any_place_runs_torchs_functions(wrapped, function, each_backend):
    case = small_case(function, residual=True, activation="gelu")
    tensors = {name: tensor.detach() for name, tensor in operands(case).items()}
    (expected,) = composed(case)(*tensors.values())
    (y,) = fused(case)(*{**tensors, wrapped: Wrapped(tensors[wrapped])}.values())
    assert type(y) is Wrapped
    torch.testing.assert_close(y.held, expected)


MODULES = [
    pytest.param(made, shape, id=made(None).__class__.__name__)
    for made, shape in [
        (lambda device: fused_ops.LayerNorm(8, activation=LEAKY, device=device), (8,)),
        (lambda device: fused_ops.AddRMSNorm(8, activation="silu", device=device), (8,)),
        (lambda device: fused_ops.GroupNorm(2, 4, activation=LEAKY, device=device), (4, 5)),
        (lambda device: fused_ops.AddInstanceNorm1d(4, affine=True, activation="silu", device=device), (4, 5)),
    ]
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("made", "shape"), MODULES)
def test_an_exported_module_runs_on_any_number_of_rows_and_trains(made, shape, strict, each_backend):
    module = made(DEVICE)
    rows = torch.export.Dim("rows", min=2)

    def inputs(count: int) -> tuple[Tensor, Tensor]:
        x, residual = (normal(count, *shape, seed=seed).to(DEVICE) for seed in (count, count + 1))
        return x.requires_grad_(), residual

    program = torch.export.export(module, inputs(4), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    seen = {FORWARD, GROUP_FORWARD} & set(targets(program.graph_module))
    assert bool(seen) == (each_backend == "triton")
    exported = program.module()
    for count in (4, 7):
        x, residual = inputs(count)
        torch.testing.assert_close(exported(x, residual), module(x, residual))
        ours, expected = (
            torch.autograd.grad(scalar(as_tuple(run(x, residual))), (x, *run.parameters()))
            for run in (exported, module)
        )
        torch.testing.assert_close(ours, expected)


def test_an_exported_program_is_saved_and_loaded(triton_backend, tmp_path):
    module = fused_ops.RMSNorm(8, activation="gelu", device=DEVICE)
    x = normal(4, 8).to(DEVICE)
    path = tmp_path / "norm.pt2"
    torch.export.save(torch.export.export(module, (x,)), path)
    assert torch.equal(torch.export.load(path).module()(x), module(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_op_for_inference_saves_nothing(mode, triton_backend):
    case = make_case("layer_norm", 3, 8, residual=True, activation="relu")
    with mode():
        graph = make_fx(fused(case))(*operands(case).values())
    (node,) = (node for node in graph.graph.nodes if node.target is FORWARD)
    assert node.args[-2:] == (False, False)


def test_every_flag_combination_of_the_forward_op_returns_what_it_names():
    x = normal(3, 8).to(DEVICE)
    for subtract_mean, add_first, statistics, bits in itertools.product((True, False), repeat=4):
        norm = RowNorm(8, 1e-5, subtract_mean, add_first, "relu")
        y, total, mean, rstd, mask = FORWARD(x, x, None, None, *norm, statistics, bits)
        sizes = [t.numel() for t in (y, total, mean, rstd, mask)]
        assert sizes == [24, 24 * add_first, 3 * (statistics and subtract_mean), 3 * statistics, 3 * bits]
