"""What traces the add_ norms with dropout sees: one op each way and the draw of a seed, which a graph makes anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fused_ops
from tests.calls import scalar
from tests.layouts import channels_last
from tests.norm_cases import DEVICE, normal, same_bits
from tests.test_compile import Recorder, nodes

pytest.importorskip("triton", reason="Triton is not installed, so there are no ops")

from fused_ops.kernels.families import family_of
from fused_ops.kernels.problem import BatchNorm, Gradients, GroupNorm, Norm, RowNorm, Wanted
from tests.dropout_cases import FUNCTIONS, ROWS, SIX, call, factor

Tensor = torch.Tensor

# torch's own, as it first loads what it exports and compiles with.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]

P = 0.4
SHAPE = (3, 4, 6)
FAMILIES = {
    "rms": "row_norm",
    "layer": "row_norm",
    "group": "group_norm",
    "instance": "group_norm",
    "batch": "batch_norm",
}
each_function = pytest.mark.parametrize("function", FUNCTIONS)
every_norm = pytest.mark.parametrize("function", SIX)
each_rate = pytest.mark.parametrize("p", [0.0, P], ids=["whole", "drops"])


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ops_of(function: str) -> list[Any]:
    """The forward and the backward op that a tracer sees; switchable norm shows it torch's operations."""
    if "switch" in function or fused_ops.get_backend() != "triton":
        return []
    family = FAMILIES[function.split("_")[1]]
    return [getattr(torch.ops.fused_ops, f"{family}_{direction}").default for direction in ("forward", "backward")]


def operands(*shape: int, layout: Any = torch.clone) -> tuple[Tensor, Tensor]:
    x, residual = (layout(normal(*(shape or SHAPE), seed=seed)).requires_grad_() for seed in (0, 1))
    return x, residual


def calling(function: str, p: float = P, **keywords: Any) -> Any:
    """The call, which draws from the generator as it finds it."""
    return lambda x, residual: call(function, x, residual, dropout_p=p, **{"activation": "gelu", **keywords})


def step(function: str, p: float = P) -> Any:
    """The call and its gradients."""

    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        outputs = calling(function, p)(x, residual)
        return *outputs, *torch.autograd.grad(scalar(outputs), (x, residual))

    return run


def seeded(run: Any, *tensors: Tensor) -> Any:
    torch.manual_seed(1)
    return run(*tensors)


def draws(graph: torch.fx.GraphModule) -> list[str]:
    """What it calls of torch's random operations."""
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function" and "rand" in str(n.target)]


# --- the ops -------------------------------------------------------------------------------------------------------

NORMS: list[Norm] = [
    *(RowNorm(6, 1e-5, mean, True, activation, 0.0, 0.0, P) for mean in (True, False) for activation in (None, "gelu")),
    *(
        GroupNorm(2, last, 1e-5, True, activation, 0.0, 0.0, P)
        for last in (True, False)
        for activation in ("relu", None)
    ),
    *(BatchNorm(last, True, 0.1, 1e-5, True, "gelu", 0.0, 0.0, P) for last in (True, False)),
]


@pytest.mark.one_in(7)
@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: "-".join(map(str, (type(norm).__name__, *norm[:-1]))))
def test_opcheck(norm: Norm, half: torch.dtype | None) -> None:
    norm = norm._replace(seed=torch.tensor([7], device=DEVICE))
    layout = channels_last if getattr(norm, "channels_last", False) else torch.clone
    x, residual = operands(layout=layout)
    if half is not None:  # on a float32 stream
        x = x.detach().to(half).requires_grad_()
    length = 6 if isinstance(norm, RowNorm) else 4
    weight, bias = (normal(length, seed=seed).requires_grad_() for seed in (2, 3))
    running = (torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE)) if isinstance(norm, BatchNorm) else ()
    family = family_of(norm)
    forward, backward = (getattr(torch.ops.fused_ops, f"{family.name}_{way}") for way in ("forward", "backward"))
    torch.library.opcheck(forward, (x, residual, weight, bias, *running, *norm, True, False))
    given = (x.detach(), residual.detach(), weight.detach(), bias.detach())
    out = family.forward(*given, norm, *running, save_statistics=True)
    arriving = torch.ones_like(x), torch.ones_like(out.total)
    saved = (*arriving, out.total, None, None, weight.detach(), bias.detach(), out.mean, out.rstd)
    for wanted in (Wanted(True, True, True, True), Wanted(True, False, False, False), Wanted(False, True, False, True)):
        torch.library.opcheck(backward, (*saved, *norm, *wanted))
        assert isinstance(family.backward(*saved, norm, wanted), Gradients)


# --- graphs --------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(8)
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@each_rate
@every_norm
def test_make_fx_sees_one_op_each_way_and_the_draw(
    function: str, p: float, tracing_mode: str, each_backend: str
) -> None:
    tensors = operands()
    graph = make_fx(step(function, p), tracing_mode=tracing_mode)(*tensors)
    shown = [node.target for node in graph.graph.nodes if "fused_ops" in str(node.target)]
    assert shown == ops_of(function)
    if ops_of(function):
        assert len(draws(graph)) == (p > 0)
    exact = {"rtol": 0, "atol": 0} if ops_of(function) else {}
    eager = step(function, p)
    if ops_of(function) or each_backend == "torch" or p == 0:  # else eager runs kernels, whose masks are others
        torch.testing.assert_close(seeded(graph, *tensors), seeded(eager, *tensors), **exact)
    if p:
        assert not torch.equal(graph(*tensors)[1], graph(*tensors)[1])
        assert all(map(same_bits, seeded(graph, *tensors), seeded(graph, *tensors)))
    if tracing_mode == "symbolic" and function in ROWS:
        more = operands(5, 4, 6)
        torch.testing.assert_close(seeded(graph, *more), seeded(eager, *more), **exact)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("used", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["y", "total", "both"])
@every_norm
def test_a_backward_may_be_traced_whose_forward_was_not(function: str, used: slice, triton_backend: None) -> None:
    """It knows the seed, and drops what forward dropped."""
    x, residual = operands()
    outputs = seeded(calling(function), x, residual)[used]
    arriving = tuple(output.detach().cos() for output in outputs)

    def backward(*arriving: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, (x, residual), arriving, retain_graph=True)

    graph = make_fx(backward)(*arriving)
    assert draws(graph) == []
    torch.testing.assert_close(graph(*arriving), backward(*arriving))
    dx, dresidual = graph(*arriving)
    torch.testing.assert_close(dx, dresidual * factor(SHAPE, P, seed=1, dtype=torch.float32))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@each_function
def test_fake_tensors_are_as_the_real_ones(function: str, layout: Any, each_backend: str) -> None:
    tensors = operands(layout=layout if function not in ROWS else torch.clone)
    real = step(function)(*tensors)
    with FakeTensorMode() as mode:
        fake = step(function)(*(mode.from_tensor(tensor) for tensor in tensors))
    described = [
        [(t.shape, t.dtype, t.stride() if each_backend == "triton" else None) for t in of] for of in (real, fake)
    ]
    assert described[0] == described[1]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["AddLayerNorm", "AddGroupNorm", "AddBatchNorm1d"])
def test_an_exported_module_trains_as_the_module(name: str, training: bool, each_backend: str) -> None:
    sizes = {"AddLayerNorm": (6,), "AddGroupNorm": (2, 4), "AddBatchNorm1d": (4,)}[name]
    module = getattr(fused_ops, name)(*sizes, activation="gelu", dropout_p=P, device=DEVICE).train(training)
    twin, tensors = copy.deepcopy(module), operands()
    program = torch.export.export(twin, tensors)
    shown = {str(node.target) for node in program.graph.nodes if "fused_ops" in str(node.target)}
    assert bool(shown) == (each_backend == "triton")
    found = [seeded(run, *tensors) for run in (program.module(), module)]
    torch.testing.assert_close(*found)


# --- torch.compile -------------------------------------------------------------------------------------------------


def assert_as_eager(compiled: Any, eager: Any, tensors: tuple[Tensor, ...], exact: bool, p: float = P) -> None:
    """Outputs and gradients under one seed: the same bits with the kernels, which are the same. On a GPU torch's own
    dropout draws otherwise eagerly than compiled, so that there both are only run."""
    found = []
    for run in (compiled, eager):
        outputs = seeded(run, *tensors)
        found.append((*outputs, *torch.autograd.grad(scalar(outputs), tensors)))
    if exact or p == 0 or DEVICE.type == "cpu":
        torch.testing.assert_close(*found, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.one_in(8)
@each_rate
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@each_function
def test_a_compiled_function_is_one_graph_with_one_op_each_way(
    function: str, activation: str | None, p: float, each_backend: str
) -> None:
    recorder, tensors = Recorder(), operands()
    run = calling(function, p, activation=activation)
    compiled = torch.compile(run, backend=recorder, fullgraph=True)
    assert_as_eager(compiled, run, tensors, exact=each_backend == "triton", p=p)
    assert len(recorder.dynamo) == len(recorder.forward) == len(recorder.backward) == 1
    if each_backend == "triton":
        forward, backward = (str(op).split(".")[1] for op in ops_of(function))
        assert len(nodes(recorder.forward, forward)) == len(nodes(recorder.backward, backward)) == 1
        # The one draw is in the forward, whose seed is handed to the backward.
        assert draws(recorder.backward[0]) == [] and len(draws(recorder.forward[0])) == (p > 0)
    if p:
        assert not torch.equal(compiled(*tensors)[1], compiled(*tensors)[1])


def test_a_compiled_switchable_norm_drops(each_backend: str) -> None:
    """By torch's operations, whose masks are torch's own: as many, anew in each run, and again under a seed."""
    x, residual = (fill(8, 4, 30, device=DEVICE).requires_grad_() for fill in (torch.ones, torch.zeros))
    compiled = torch.compile(calling("add_switch_norm"), backend="aot_eager", fullgraph=True)
    (y, total), again = seeded(compiled, x, residual), seeded(compiled, x, residual)
    assert torch.equal(total, again[1]) and not torch.equal(total, compiled(x, residual)[1])
    share = float((total != 0).double().mean())
    assert abs(share - (1 - P)) <= 5 * (P * (1 - P) / total.numel()) ** 0.5
    dx, dresidual = torch.autograd.grad(scalar((y, total)), (x, residual))
    torch.testing.assert_close(dx, torch.where(total != 0, dresidual / (1 - P), 0.0))


def test_a_compiled_gradient_is_only_that_of_what_requires_it(triton_backend: None) -> None:
    for wanted in ((True, False), (False, True)):
        torch._dynamo.reset()
        recorder = Recorder()
        tensors = [tensor.requires_grad_(wants) for tensor, wants in zip(operands(), wanted, strict=True)]
        y, _ = torch.compile(calling("add_layer_norm"), backend=recorder, fullgraph=True)(*tensors)
        y.sum().backward()
        (node,) = nodes(recorder.backward, "row_norm_backward")
        assert node.args[-4:-2] == wanted


def test_a_graph_for_inference_saves_nothing_and_drops(triton_backend: None) -> None:
    recorder = Recorder()
    compiled = torch.compile(calling("add_layer_norm"), backend=recorder, fullgraph=True)
    with torch.no_grad():
        _, total = seeded(compiled, *operands())
    x, residual = operands()
    torch.testing.assert_close(total, residual + x * factor(SHAPE, P, seed=1, dtype=torch.float32))
    (node,) = nodes(recorder.dynamo, "row_norm_forward")
    assert node.args[-2:] == (False, False)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("function", ["add_layer_norm", "add_group_norm"])
def test_row_counts_make_it_dynamic_once(function: str, each_backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(calling(function), backend=counter, fullgraph=True)
    for rows in (3, 7, 9, 11):
        scalar(compiled(*operands(rows, 4, 6))).backward()
    assert counter.frame_count == 2


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["AddRMSNorm", "AddBatchNorm1d"])
def test_a_compiled_module_trains_as_the_module(name: str, each_backend: str) -> None:
    module = getattr(fused_ops, name)(*((6,) if "RMS" in name else (4,)), activation="silu", dropout_p=P, device=DEVICE)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    tensors = operands()
    for training in (True, False):
        found = []
        for run in (compiled, module):
            outputs = seeded(run.train(training), *tensors)
            found.append((*outputs, *torch.autograd.grad(scalar(outputs), (*tensors, *run.parameters()))))
        torch.testing.assert_close(*found)
    torch.testing.assert_close(dict(compiled.named_buffers()), {f"_orig_mod.{n}": b for n, b in module.named_buffers()})


@pytest.mark.one_in(2)
@pytest.mark.parametrize("function", ["add_layer_norm", "add_batch_norm"])
def test_checkpointing_inside_a_compiled_function(function: str, each_backend: str) -> None:
    run = calling(function)
    compiled = torch.compile(lambda *t: checkpoint(run, *t, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert_as_eager(compiled, run, operands(), exact=each_backend == "triton")
