"""What traces residual_add sees: torch.library ops, fake and meta tensors, make_fx, torch.export, torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops import Activation
from fused_ops import functional as F
from tests.calls import gradients, scalar
from tests.layouts import channels_last, every_other_column, spatial_dims_swapped
from tests.norm_cases import DEVICE, normal, with_fields
from tests.residual_add_cases import EACH_KIND, AddCase, fused, make_case, operands, with_layout
from tests.test_compile import Recorder, nodes

pytest.importorskip("triton", reason="Triton is not installed, so there are no ops")

from fused_ops import ops
from fused_ops.kernels.problem import ResidualAdd

Tensor = torch.Tensor

# torch's own, as it first loads what it exports and compiles with.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]

NAMES = ("residual_add_forward", "residual_add_backward")
FORWARD, BACKWARD = (getattr(torch.ops.fused_ops, name).default for name in NAMES)
DROPS = {"dropout_p": 0.3, "drop_path_p": 0.3}
every_kind = pytest.mark.parametrize("activation", EACH_KIND)
each_rate = pytest.mark.parametrize("rates", [{}, DROPS], ids=["whole", "drops"])


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- the ops -------------------------------------------------------------------------------------------------------

SAMPLES = [
    pytest.param(name, *sample, id=f"{name}-{index}")
    for name in NAMES
    for index, sample in enumerate(ops.sample_inputs(name, DEVICE))
]


@pytest.mark.one_in(18)
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
    assert {name for name in both_ways if seen[name] != {True, False}} <= {"wants_dx"}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("layout", [channels_last, spatial_dims_swapped], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_an_op_of_mixed_types_and_layouts_is_as_its_fake_says(half, layout):
    """x half, stream and its gradient float32, a scale that differs from both."""
    case = with_layout(make_case(2, 4, 5, 3, dtype=half, residual_dtype=torch.float32), layout, "x", "dy")
    scale, seed = normal(4, 1, 1, dtype=torch.float64), torch.tensor([7], device=DEVICE)
    problem = ResidualAdd(0.3, 0.2, "relu")
    torch.library.opcheck(FORWARD, (case.x, case.residual, scale, seed, *problem, True))
    y, bits = FORWARD(case.x, case.residual, scale, seed, *problem, True)
    saved = (case.dy, case.x, None, scale, bits, seed)
    torch.library.opcheck(BACKWARD, (*saved, *problem, True, True, True, y.stride(), half))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_an_op_without_elements_is_as_its_fake_says(shape):
    x, scale = normal(*shape), normal(1)
    problem = ResidualAdd(0.0, 0.0, "relu")
    torch.library.opcheck(FORWARD, (x, x.clone(), scale, None, *problem, True))
    bits = x.new_empty(0, dtype=torch.uint8)
    saved = (x, x.clone(), None, scale, bits, None)
    torch.library.opcheck(BACKWARD, (*saved, *problem, True, True, True, x.stride(), x.dtype))


def test_bits_and_gradients_of_an_op_carry_no_gradient():
    x = torch.ones(2, 4, device=DEVICE, requires_grad=True)
    y, bits = FORWARD(x, x, None, None, *ResidualAdd(0.0, 0.0, "relu"), True)
    assert y.requires_grad and not bits.requires_grad


# --- fake and meta tensors -----------------------------------------------------------------------------------------

IMAGE = (2, 4, 3, 5)
LAYOUTS = {
    "contiguous": make_case(*IMAGE, scale=(4, 1, 1), activation="gelu"),
    "bare": make_case(*IMAGE),
    "channels_last": with_layout(make_case(*IMAGE, scale=(4, 1, 1), activation="relu"), channels_last),
    "channels_last with drops": with_layout(make_case(*IMAGE, activation="relu", **DROPS), channels_last),
    "x alone channels_last": with_layout(make_case(*IMAGE, activation="relu"), channels_last, "x"),
    "all but x channels_last": with_layout(make_case(*IMAGE, activation="silu"), channels_last, "residual", "dy"),
    "another order": with_layout(make_case(*IMAGE, activation="relu", **DROPS), spatial_dims_swapped),
    "strided": with_layout(make_case(*IMAGE, scale=(5,), **DROPS), every_other_column),
    "expanded": make_case(*IMAGE, x=normal(1, 4, 1, 5).expand(IMAGE), dy=normal(1).expand(IMAGE), activation="gelu"),
    "no elements": make_case(0, 4, scale=(4,), activation="relu", **DROPS),
    "one number": make_case(scale=(), activation="relu", dropout_p=0.3),
    "float32 stream": make_case(
        *IMAGE, dtype=torch.float16, residual_dtype=torch.float32, scale=(5,), scale_dtype=torch.float32, **DROPS
    ),
    "float64": make_case(*IMAGE, dtype=torch.float64, scale=IMAGE, activation="elu"),
}
each_layout = pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)


def described(tensors: Any) -> list[tuple]:
    """Shapes and types, and with the kernels strides: torch's own fakes of a gradient differ from it in theirs."""
    strides = fused_ops.get_backend() == "triton"
    return [(tuple(t.shape), t.dtype, t.stride() if t.numel() and strides else None) for t in tensors]


def call_and_gradients(case: AddCase, tensors: dict[str, Tensor], arriving: Tensor) -> tuple[Tensor, ...]:
    (y,) = fused(case)(*tensors.values())
    return y, *torch.autograd.grad(y, list(tensors.values()), arriving)


@pytest.mark.one_in(2)
@each_layout
def test_fake_tensors_are_as_the_real_ones(case, each_backend):
    leaves = case.leaves()
    real = call_and_gradients(case, leaves, case.dy)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(leaf) for name, leaf in leaves.items()}
        fake = call_and_gradients(case, fakes, mode.from_tensor(case.dy))
    assert described(fake) == described(real)


@each_layout
def test_meta_tensors_are_as_the_real_ones(case, each_backend):
    real = fused(case)(*case.leaves().values())
    on_meta = fused(case)(*(tensor.detach().to("meta") for tensor in case.leaves().values()))
    assert on_meta[0].is_meta
    assert described(on_meta) == described([real[0]])


# --- graphs --------------------------------------------------------------------------------------------------------


def targets(graph_module: torch.fx.GraphModule) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def step(case: AddCase) -> Any:
    """The call and its gradients, which draws from the generator as it finds it."""

    def function(x: Tensor, residual: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        y = F.residual_add(x, residual, scale=scale, **case.keywords)
        return y, *torch.autograd.grad(scalar((y,)), (x, residual, scale))

    return function


def seeded(function: Any, *tensors: Tensor) -> Any:
    torch.manual_seed(1)
    return function(*tensors)


@pytest.mark.one_in(6)
@each_rate
@every_kind
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_sees_one_op_each_way(tracing_mode, activation, rates, each_backend):
    """And the draw of the seed: each run of the graph drops anew, as torch's generator says."""
    case = make_case(3, 8, activation=activation, scale=(8,), **rates)
    tensors = tuple(operands(case).values())
    graph = make_fx(step(case), tracing_mode=tracing_mode)(*tensors)
    shown = [target for target in targets(graph) if "fused_ops" in str(target)]
    assert shown == ([FORWARD, BACKWARD] if each_backend == "triton" else [])
    exact = {"rtol": 0, "atol": 0} if each_backend == "triton" else {}
    torch.testing.assert_close(seeded(graph, *tensors), seeded(step(case), *tensors), **exact)
    if rates:
        assert not torch.equal(graph(*tensors)[0], graph(*tensors)[0])
    if tracing_mode == "symbolic":
        more = tuple(operands(make_case(5, 8, scale=(8,), seed=7)).values())
        torch.testing.assert_close(seeded(graph, *more), seeded(step(case), *more), **exact)


def test_a_dispatch_mode_sees_the_ops(triton_backend):
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    case = make_case(3, 8, activation="relu", scale=(8,), **DROPS)
    with Watching():
        found = gradients(fused(case), operands(case))
    assert seen.count(FORWARD) == seen.count(BACKWARD) == 1
    torch.testing.assert_close(found, gradients(fused(case), operands(case)), rtol=0, atol=0)


@pytest.mark.one_in(3)
@each_rate
@every_kind
def test_a_backward_may_be_traced_whose_forward_was_not(activation, rates, triton_backend):
    case = make_case(3, 8, activation=activation, scale=(8,), **rates)
    tensors = operands(case)
    (y,) = fused(case)(*tensors.values())

    def backward(dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, list(tensors.values()), dy, retain_graph=True)

    graph = make_fx(backward)(torch.ones_like(y))
    assert BACKWARD in targets(graph)
    torch.testing.assert_close(graph(y.detach().cos()), backward(y.detach().cos()), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [None, (4,)])
@every_kind
def test_an_op_called_for_inference_has_right_gradients_nonetheless(activation, scale, triton_backend):
    """A graph that was traced without gradients asks for no bits, and may yet be run with them."""
    case = make_case(3, 4, dtype=torch.float64, scale=scale, activation=activation)
    traced = make_fx(lambda *t: fused(case)(*t))(*(tensor.detach() for tensor in operands(case).values()))
    (node,) = (node for node in traced.graph.nodes if node.target is FORWARD)
    assert node.args[-1] is False
    torch.testing.assert_close(gradients(traced, operands(case)), gradients(fused(case), operands(case)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_exported_module_runs_on_any_number_of_rows_and_trains(training, strict, each_backend):
    module = fused_ops.ResidualAdd("gelu", scale=(8, 0.5), **DROPS, device=DEVICE).train(training)
    rows = torch.export.Dim("rows", min=2)

    def inputs(count: int) -> tuple[Tensor, Tensor]:
        return normal(count, 8, seed=count).requires_grad_(), normal(count, 8, seed=count + 1)

    program = torch.export.export(module, inputs(4), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
    assert (FORWARD in targets(program.graph_module)) == (each_backend == "triton")
    exported = program.module()
    for count in (4, 7):
        x, residual = inputs(count)
        found = []
        for run in (exported, module):
            y = seeded(run, x, residual)
            found.append((y, *torch.autograd.grad(scalar((y,)), (x, *run.parameters()))))
        torch.testing.assert_close(*found)


# --- torch.compile -------------------------------------------------------------------------------------------------


def assert_as_eager(compiled: Any, eager: Any, tensors: dict[str, Tensor]) -> None:
    """Outputs and gradients under one seed: the same bits with the kernels, which are the same."""
    exact = {"rtol": 0, "atol": 0} if fused_ops.get_backend() == "triton" else {}
    found = []
    for call in (compiled, eager):
        y = seeded(call, *tensors.values())
        wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
        found.append((y, *torch.autograd.grad(scalar((y,)), wanted)))
    torch.testing.assert_close(*found, **exact)


def calling(case: AddCase) -> Any:
    def call(x: Tensor, residual: Tensor, scale: Tensor | None = None) -> Tensor:
        return F.residual_add(x, residual, scale=scale, **case.keywords)

    return call


@pytest.mark.one_in(4)
@each_rate
@pytest.mark.parametrize("activation", [*EACH_KIND, Activation("leaky_relu", negative_slope=0.2)], ids=str)
def test_a_compiled_function_is_one_graph_with_one_op_each_way(activation, rates, each_backend):
    case = make_case(4, 8, activation=activation, scale=(8,), **rates)
    recorder = Recorder()
    compiled = torch.compile(calling(case), backend=recorder, fullgraph=True)
    assert_as_eager(compiled, calling(case), operands(case))
    assert len(recorder.dynamo) == len(recorder.forward) == len(recorder.backward) == 1
    if each_backend == "triton":
        assert len(nodes(recorder.forward, "residual_add_forward")) == 1
        assert len(nodes(recorder.backward, "residual_add_backward")) == 1
        # The one draw is in the forward, whose seed is handed to the backward.
        assert [target for target in targets(recorder.backward[0]) if "rand" in str(target)] == []
        assert len([target for target in targets(recorder.forward[0]) if "rand" in str(target)]) == bool(rates)
    if rates:
        x, *others = operands(case).values()
        assert not torch.equal(compiled(x, *others), compiled(x, *others))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@each_rate
def test_what_is_compiled_keeps_the_layout(layout, rates, triton_backend):
    case = with_layout(make_case(2, 6, 4, 5, activation="relu", scale=(6, 1, 1), **rates), layout, "x")
    tensors = case.leaves()
    found = []
    for call in (torch.compile(calling(case), backend="aot_eager", fullgraph=True), calling(case)):
        y = seeded(call, *tensors.values())
        (dx,) = torch.autograd.grad(y, tensors["x"], case.dy)
        assert y.stride() == dx.stride() == case.x.stride()
        found.append((y, dx))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_bare_sum_has_no_op_in_its_backward(triton_backend):
    recorder = Recorder()
    case = make_case(4, 8)
    assert_as_eager(torch.compile(calling(case), backend=recorder, fullgraph=True), calling(case), operands(case))
    assert nodes(recorder.forward, "residual_add_forward") and not nodes(recorder.backward, "residual_add_backward")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("activation", "frozen", "wanted"),
    [
        ("gelu", ("x",), (False, True, True)),
        ("gelu", ("residual", "scale"), (True, False, False)),
        (None, (), (True, False, True)),  # dresidual is dy
        ("relu", ("x", "residual"), (False, False, True)),
    ],
)
def test_a_compiled_gradient_is_only_that_of_what_requires_it(activation, frozen, wanted, triton_backend):
    recorder = Recorder()
    case = make_case(4, 8, activation=activation, scale=(8,), frozen=frozen)
    assert_as_eager(torch.compile(calling(case), backend=recorder, fullgraph=True), calling(case), operands(case))
    (node,) = nodes(recorder.backward, "residual_add_backward")
    assert node.args[-5:-2] == wanted


def test_row_counts_make_it_dynamic_once(each_backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(calling(make_case(1, activation="relu", **DROPS)), backend=counter, fullgraph=True)
    for rows in (4, 7, 9, 11, 30):
        compiled(normal(rows, 8).requires_grad_(), normal(rows, 8), normal(8)).sum().backward()
    assert counter.frame_count == 2


def test_a_dim_may_be_declared_dynamic(each_backend):
    """Raises where a call would fix the number of rows by looking at it."""
    x = normal(4, 8).requires_grad_()
    torch._dynamo.mark_dynamic(x, 0, min=2, max=1 << 30)
    compiled = torch.compile(
        lambda x, scale: F.residual_add(x, x, scale=scale, activation="relu", **DROPS),
        backend="aot_eager",
        fullgraph=True,
    )
    compiled(x, normal(8).requires_grad_()).sum().backward()


def test_a_compiled_module_trains_as_the_module(each_backend):
    module = fused_ops.ResidualAdd("silu", scale=((6, 1, 1), 0.5), **DROPS, device=DEVICE)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    x, residual = normal(2, 6, 3, 4), normal(2, 6, 3, 4, seed=1)
    for training in (True, False):
        y, expected = (seeded(run.train(training), x, residual) for run in (compiled, module))
        torch.testing.assert_close(y, expected)
        for output in (y, expected):
            scalar((output,)).backward()
    torch.testing.assert_close(compiled.scale.grad, module.scale.grad)


@pytest.mark.one_in(2)
@each_rate
def test_checkpointing_inside_a_compiled_function(rates, each_backend):
    case = make_case(4, 8, activation="gelu", scale=(8,), **rates)
    call = calling(case)
    compiled = torch.compile(lambda *t: checkpoint(call, *t, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert_as_eager(compiled, call, operands(case))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_graph_for_inference_saves_nothing(mode, triton_backend):
    recorder = Recorder()
    case = make_case(4, 8, activation="relu", scale=(8,))
    compiled = torch.compile(calling(case), backend=recorder, fullgraph=True)
    with mode():
        compiled(*operands(with_fields(case, frozen=())).values())
    (node,) = nodes(recorder.dynamo, "residual_add_forward")
    assert node.args[-1] is False
