"""torch.compile: one graph without a break, the op in it, eager's numbers, and no more compilations than needed."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import fused_ops
from fused_ops import Activation
from fused_ops import functional as F
from tests.calls import as_tuple, fused, gradients, operands, scalar
from tests.channel_norm_cases import make_case as make_channel_case
from tests.channel_norm_cases import with_layout
from tests.every_norm import FUNCTIONS, small_case
from tests.layouts import channels_last
from tests.norm_cases import DEVICE, normal
from tests.row_norm_cases import FUNCTIONS as ROW_FUNCTIONS
from tests.row_norm_cases import make_case

Tensor = torch.Tensor

# torch's own, as it first loads Inductor or forward-mode differentiation.
pytestmark = [pytest.mark.one_in(8), pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A compiler that runs the graphs as they are and keeps them: dynamo's, AOTAutograd's forward and its backward."""

    def __init__(self) -> None:
        self.dynamo: list[torch.fx.GraphModule] = []
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []
        self._aot = aot_autograd(fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward))

    @staticmethod
    def _keep(graphs: list[torch.fx.GraphModule]) -> Any:
        def compile(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return compile

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.dynamo.append(graph)
        return self._aot(graph, example_inputs)


def nodes(graphs: list[torch.fx.GraphModule], name: str) -> list[torch.fx.Node]:
    return [node for graph in graphs for node in graph.graph.nodes if name in str(node.target)]


def assert_as_eager(compiled: Any, eager: Any, tensors: dict[str, Tensor]) -> None:
    """Outputs and gradients: the same bits with the kernels, which are the same; torch may decompose its own."""
    exact = {"rtol": 0, "atol": 0} if fused_ops.get_backend() == "triton" else {}
    torch.testing.assert_close(as_tuple(compiled(*tensors.values())), as_tuple(eager(*tensors.values())), **exact)
    ours, expected = (gradients(lambda *t: as_tuple(call(*t)), tensors) for call in (compiled, eager))  # noqa: B023
    torch.testing.assert_close(ours, expected, **exact)


FORMS = [
    *((function, "relu") for function in FUNCTIONS),
    ("layer_norm", Activation("leaky_relu", negative_slope=0.2)),
    ("add_rms_norm", nn.Softplus(beta=2)),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("function", "activation"), FORMS)
def test_a_compiled_function_is_one_graph_with_one_op_each_way(function, activation, each_backend):
    case = small_case(function, 4, 8, residual=True, activation="relu")
    names = tuple(operands(case))

    def call(*tensors: Tensor) -> Any:
        args, kwargs = case.arguments(dict(zip(names, tensors, strict=True)))
        return getattr(F, function)(*args, **{**kwargs, "activation": activation})

    recorder = Recorder()
    assert_as_eager(torch.compile(call, backend=recorder, fullgraph=True), call, operands(case))
    assert len(recorder.dynamo) == len(recorder.forward) == len(recorder.backward) == 1
    expected = [1, 1] if each_backend == "triton" else [0, 0]
    family = "row_norm" if function in ROW_FUNCTIONS else "group_norm"
    found = [nodes(recorder.forward, f"fused_ops.{family}_f"), nodes(recorder.backward, f"fused_ops.{family}_b")]
    assert [len(graph) for graph in found] == expected


MODULES = {  # the sizes of each, its activation, and the shape of an x
    fused_ops.LayerNorm: ((8,), None, (4, 8)),
    fused_ops.RMSNorm: ((8,), "gelu", (4, 8)),
    fused_ops.AddLayerNorm: ((8,), Activation("elu", alpha=0.5), (4, 8)),
    fused_ops.AddRMSNorm: ((8,), nn.SiLU(), (4, 8)),
    fused_ops.GroupNorm: ((2, 8), "silu", (4, 8, 3)),
    fused_ops.AddInstanceNorm2d: ((8, 1e-5, 0.1, True), "relu", (2, 8, 2, 3)),
}


@pytest.mark.parametrize("cls", MODULES)
def test_a_compiled_module_trains_as_the_module(cls, each_backend):
    sizes, activation, shape = MODULES[cls]
    module = cls(*sizes, activation=activation, device=DEVICE)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    x, residual = normal(*shape), normal(*shape, seed=1)
    for run in (module, compiled):
        scalar(as_tuple(run(x, residual))).backward()
    exact = {"rtol": 0, "atol": 0} if each_backend == "triton" else {}
    torch.testing.assert_close(as_tuple(compiled(x, residual)), as_tuple(module(x, residual)), **exact)
    for ours, eager in zip(compiled.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, eager.grad, **exact)


def test_several_layers_are_one_graph(each_backend):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = fused_ops.AddLayerNorm(8)
            self.linear = nn.Linear(8, 8)
            self.after = fused_ops.AddRMSNorm(8, activation="gelu")

        def forward(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
            y, stream = self.before(x, stream)
            return self.after(self.linear(y), stream)

    block = Block().to(DEVICE)
    tensors = {"x": normal(4, 8).requires_grad_(), "stream": normal(4, 8, seed=1).requires_grad_()}
    assert_as_eager(torch.compile(block, backend="aot_eager", fullgraph=True), block, tensors)


# --- how often -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["layer_norm", "add_rms_norm"])
def test_row_counts_compile_once(function, each_backend):
    """Forward and backward; 0 and 1 are numbers of their own to torch.compile."""
    if DEVICE.type == "cuda" and function == "add_rms_norm" and each_backend == "torch" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11's fused RMS norm misreads sizes that are symbols")
    compiled = None
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 7, 2, 64, 3):
            case = make_case(function, rows, 8, residual=True, activation="gelu", seed=rows)
            compiled = compiled or torch.compile(fused(case), backend="aot_eager", dynamic=True, fullgraph=True)
            assert_as_eager(compiled, fused(case), operands(case))


@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("function", ["group_norm", pytest.param("add_instance_norm", marks=pytest.mark.full)])
@pytest.mark.parametrize("each_backend", ["triton", pytest.param("torch", marks=pytest.mark.full)], indirect=True)
def test_batch_and_spatial_sizes_compile_once(function, layout, each_backend):
    compiled = None
    with torch._dynamo.config.patch(error_on_recompile=True):
        for samples, height, width in ((3, 6, 5), (5, 3, 7), (2, 5, 6)):  # sizes that are equal once compile anew
            case = make_channel_case(function, samples, 4, height, width, groups=2, residual=True, activation="gelu")
            case = with_layout(case, layout)
            compiled = compiled or torch.compile(fused(case), backend="aot_eager", dynamic=True, fullgraph=True)
            assert_as_eager(compiled, fused(case), operands(case))


@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
def test_what_is_compiled_keeps_the_layout(layout, triton_backend):
    """With a mask, whose bits lie as x does, and a dy of the other layout."""
    case = make_channel_case("instance_norm", 2, 6, 4, 5, residual=True, activation="relu")
    case = with_layout(case, layout, "x")
    compiled = torch.compile(fused(case), backend="aot_eager", fullgraph=True)
    tensors = operands(case)
    (y,) = compiled(*tensors.values())
    (dx,) = torch.autograd.grad(y, tensors["x"], case.dy)
    assert y.stride() == dx.stride() == case.x.stride()
    (eager,) = fused(case)(*tensors.values())
    (expected,) = torch.autograd.grad(eager, tensors["x"], case.dy)
    torch.testing.assert_close((y, dx), (eager, expected))


def test_a_second_row_count_makes_it_dynamic_by_itself(each_backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: F.layer_norm(x, (8,), activation="relu"), backend=counter, fullgraph=True)
    for rows in (4, 7, 9, 11, 30):
        compiled(normal(rows, 8))
    assert counter.frame_count == 2


def test_a_dim_may_be_declared_dynamic(each_backend):
    """Raises where a call would fix the number of rows by looking at it."""
    x = normal(4, 8).requires_grad_()
    torch._dynamo.mark_dynamic(x, 0, min=2, max=1 << 30)
    compiled = torch.compile(lambda x: F.rms_norm(x, (8,), activation="relu"), backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()


def test_the_normalized_shape_may_be_read_from_a_dynamic_tensor(each_backend):
    compiled = torch.compile(
        lambda x: F.layer_norm(x, x.shape[-1:]) + F.rms_norm(x, x.shape[-1]),
        backend="eager",
        dynamic=True,
        fullgraph=True,
    )
    for span in (8, 12):
        x = normal(4, span)
        torch.testing.assert_close(compiled(x), F.layer_norm(x, (span,)) + F.rms_norm(x, (span,)))


def test_another_backend_or_activation_parameter_is_another_graph():
    pytest.importorskip("triton")
    recorder = Recorder()
    compiled = torch.compile(
        lambda x, activation: F.layer_norm(x, (8,), activation=activation), backend=recorder, fullgraph=True
    )
    x = normal(4, 8)
    for backend in ("triton", "torch", "triton"):
        with fused_ops.use_backend(backend):
            for slope in (0.1, 0.4):
                activation = Activation("leaky_relu", negative_slope=slope)
                torch.testing.assert_close(compiled(x, activation), F.layer_norm(x, (8,), activation=activation))
    assert len(nodes(recorder.dynamo, "row_norm_forward")) >= 1
    assert len(nodes(recorder.dynamo, "leaky_relu")) >= 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_graph_for_inference_saves_nothing(mode, triton_backend):
    recorder = Recorder()
    case = make_case("add_layer_norm", 4, 8, activation="gelu")
    compiled = torch.compile(fused(case), backend=recorder, fullgraph=True)
    with mode():
        compiled(*operands(case).values())
    (node,) = nodes(recorder.dynamo, "row_norm_forward")
    assert node.args[-2:] == (False, False)


# --- beside other features -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "frozen", "wanted"),
    [
        ("layer_norm", ("x", "bias"), (False, True, True, False)),
        ("add_layer_norm", ("x", "weight"), (True, False, False, True)),  # dresidual is dx
        ("add_layer_norm", ("x", "residual", "bias"), (False, False, True, False)),
    ],
)
def test_a_compiled_gradient_is_only_that_of_what_requires_it(function, frozen, wanted, triton_backend):
    recorder = Recorder()
    case = make_case(function, 4, 8, residual=True, activation="gelu", frozen=frozen)
    assert_as_eager(torch.compile(fused(case), backend=recorder, fullgraph=True), fused(case), operands(case))
    (node,) = nodes(recorder.backward, "row_norm_backward")
    assert node.args[-4:] == wanted


def test_a_compiled_backward_knows_no_gradient_of_an_unused_output(triton_backend):
    recorder = Recorder()
    case = make_case("add_layer_norm", 4, 8, activation="gelu")
    assert_as_eager(
        torch.compile(lambda *t: fused(case)(*t)[0], backend=recorder, fullgraph=True),
        lambda *t: fused(case)(*t)[0],
        operands(case),
    )
    (node,) = nodes(recorder.backward, "row_norm_backward")
    assert node.args[1] is None


def test_checkpointing_inside_a_compiled_function(each_backend):
    from torch.utils.checkpoint import checkpoint

    case = make_case("layer_norm", 4, 8, residual=True, activation="gelu")
    call = fused(case)
    compiled = torch.compile(lambda *t: checkpoint(call, *t, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert_as_eager(compiled, call, operands(case))


def test_autocast_inside_a_compiled_function(each_backend):
    case = make_case("add_layer_norm", 4, 8, activation="gelu")

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return fused(case)(*tensors)

    assert_as_eager(torch.compile(call, backend="aot_eager"), call, operands(case))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which the compiler looks at
@pytest.mark.parametrize("compiles", ["forward and backward", "backward"])
def test_compiled_autograd(compiles, each_backend):
    case = make_case("add_layer_norm", 4, 8, activation="gelu")
    tensors = operands(case)

    def loss() -> Tensor:
        return scalar(fused(case)(*tensors.values()))

    with torch._dynamo.config.patch(compiled_autograd=True):
        if compiles == "backward":
            torch.compile(lambda loss: loss.backward(), backend="aot_eager")(loss())
        else:
            torch.compile(lambda: loss().backward(), backend="aot_eager")()
    expected = gradients(fused(case), operands(case))
    torch.testing.assert_close({name: tensor.grad for name, tensor in tensors.items()}, expected)


TRANSFORMS = {
    "vmap": lambda call: torch.vmap(call),
    "grad": lambda call: torch.func.grad(lambda x: scalar((call(x),))),
    "jacrev": lambda call: torch.func.jacrev(call),
    "jvp": lambda call: lambda x: torch.func.jvp(call, (x,), (x.cos(),)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_inside_a_compiled_function_and_around_one(transform, each_backend):
    def call(x: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), residual=x, activation="hardsigmoid")

    x = normal(4, 8, dtype=torch.float64)
    expected = TRANSFORMS[transform](call)(x)
    inside = torch.compile(TRANSFORMS[transform](call), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(inside(x), expected)
    around = torch.compile(call, backend="aot_eager")
    around(x)  # compiled for a plain call first, which must not serve a transformed one
    torch.testing.assert_close(TRANSFORMS[transform](around)(x), expected)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the C++ side of Inductor")
def test_inductor_fuses_the_composition():
    case = make_case("add_layer_norm", 4, 8, activation="gelu")
    with fused_ops.use_backend("torch"):
        assert_as_eager(torch.compile(fused(case), fullgraph=True), fused(case), operands(case))
