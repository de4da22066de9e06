"""What users of torch combine with a model, on models that fuse changed: each as on the original."""

from __future__ import annotations

import copy
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import fused_ops
from fused_ops import fuse, fusion_report, unfuse
from tests.fused_models import MODELS, every_model, made
from tests.norm_cases import DEVICE, normal

Tensor = torch.Tensor

pytestmark = [
    pytest.mark.usefixtures("each_backend"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own, as it loads Inductor
]

without_draws = pytest.mark.parametrize("name", [name for name in MODELS if name != "Transformer"])


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A fused model, the same one as it was, and an input."""
    model, x = made(name)
    return fuse(copy.deepcopy(model)), model, x


def pair_in_evaluation(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    fused, original, x = pair(name)
    return fused.eval(), original.eval(), x


def results(model: Any, x: Tensor, parameters: Any = None) -> list[Tensor]:
    """The output and every gradient of a loss, and the buffers."""
    x = x.clone().requires_grad_()
    learning = list(model.parameters() if parameters is None else parameters)
    y = model(x)
    weight = torch.linspace(0, 7, y.numel(), device=y.device).cos().view_as(y).to(y.dtype)
    gradients = torch.autograd.grad((y * weight).sum(), [x, *learning])
    return [y.detach(), *gradients, *(buffer.clone() for buffer in model.buffers())]


def assert_as_original(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(found, expected, **({"rtol": 1e-4, "atol": 1e-4} | tolerance))


# --- compilers ------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("training", [True, False])
@without_draws
def test_it_compiles_without_a_graph_break(name: str, training: bool) -> None:
    fused, original, x = pair(name)
    fused.train(training), original.train(training)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_as_original(results(compiled, x, fused.parameters()), results(original, x))


@pytest.mark.one_in(4)
@without_draws
def test_batch_sizes_do_not_compile_again(name: str) -> None:
    fused, original, x = pair_in_evaluation(name)
    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for samples in (6, 9, 7):  # other than the other sizes: those that are equal once compile anew
            x = normal(samples, *x.shape[1:])
            torch.testing.assert_close(compiled(x), original(x), rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_compiles_it(mode: str) -> None:
    fused, original, x = pair("ResNet")
    compiled = torch.compile(fused, fullgraph=True, mode=mode)
    assert_as_original(results(compiled, x, fused.parameters()), results(original, x))


@pytest.mark.one_in(3)
@without_draws
def test_it_is_exported_for_any_batch_size(name: str) -> None:
    fused, original, x = pair_in_evaluation(name)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(fused, (x,), dynamic_shapes=dynamic)
    other = normal(5, *x.shape[1:])
    torch.testing.assert_close(program.module()(other), original(other), rtol=1e-4, atol=1e-4)


@pytest.mark.one_in(2)
@without_draws
def test_make_fx_traces_it(name: str) -> None:
    fused, original, x = pair_in_evaluation(name)
    graph = make_fx(fused, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(graph(x), original(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # make_graphed_callables warms up on its own
def test_it_is_captured_in_a_cuda_graph() -> None:
    fused, original, x = pair("ResNet")
    make = torch.cuda.make_graphed_callables
    graphed = make(fused, (x.clone().requires_grad_(),))
    assert_as_original(results(graphed, x, fused.parameters()), results(original, x))


# --- types, transforms, memory --------------------------------------------------------------------------------------


@every_model
def test_autocast_is_the_originals(name: str) -> None:
    fused, original, x = pair_in_evaluation(name)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found, expected = fused(x), original(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.one_in(2)
@without_draws
def test_transforms_of_functional_calls(name: str) -> None:
    fused, original, x = pair_in_evaluation(name)

    def transformed(model: nn.Module) -> list[Tensor]:
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}

        def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(model, {**state, **parameters}, (sample[None],)).square().sum()

        learning = dict(model.named_parameters())
        of_samples = vmap(grad(loss), in_dims=(None, 0))(learning, x)
        return [*of_samples.values(), jacrev(lambda sample: loss(learning, sample))(x[0])]

    assert_as_original(transformed(fused), transformed(original), rtol=1e-3, atol=1e-3)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("use_reentrant", [True, False])
@every_model
def test_checkpoints_recompute_it(name: str, use_reentrant: bool) -> None:
    fused, original, x = pair(name)

    def checkpointed(sample: Tensor) -> Any:
        return checkpoint(fused, sample, use_reentrant=use_reentrant)

    found = []
    for model in (checkpointed, original):
        torch.manual_seed(5)
        learning = fused.parameters() if model is checkpointed else original.parameters()
        sample = x.clone().requires_grad_()
        y = model(sample)
        (y * y.detach().cos()).sum().backward()
        found.append([y.detach(), sample.grad, *(p.grad for p in learning)])
    assert_as_original(*found)


def test_deterministic_algorithms_have_nothing_to_refuse() -> None:
    fused, original, x = pair("ResNet")
    torch.use_deterministic_algorithms(True)
    try:
        found, again = (results(copy.deepcopy(fused), x) for _ in range(2))  # each moves the running statistics
    finally:
        torch.use_deterministic_algorithms(False)
    assert_as_original(found, results(original, x))
    assert all(torch.equal(*both) for both in zip(found, again, strict=True))


# --- the state ------------------------------------------------------------------------------------------------------


@every_model
def test_a_state_is_saved_and_loaded_by_either(name: str, tmp_path: Path) -> None:
    fused, original, x = pair(name)
    torch.save(fused.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    assert state.keys() == original.state_dict().keys()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter += 1
    original.load_state_dict(state)
    fused.load_state_dict(state)
    torch.testing.assert_close(fused.eval()(x), original.eval()(x), rtol=1e-4, atol=1e-4)


@every_model
def test_a_meta_model_becomes_real(name: str) -> None:
    original, x = made(name)
    with torch.device("meta"):
        fused = fuse(MODELS[name][0]())
    assert all(entry.fused for entry in fusion_report(fused))
    fused.to_empty(device=DEVICE).load_state_dict(original.state_dict())
    torch.testing.assert_close(fused.eval()(x), original.eval()(x), rtol=1e-4, atol=1e-4)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrizations_before_and_after() -> None:
    before, x = made("ResNet")
    original = copy.deepcopy(before)
    parametrizations.weight_norm(before[0].conv1), parametrizations.weight_norm(original[0].conv1)
    fuse(before)
    for model in (before, original):
        parametrize.register_parametrization(model[0].bn1, "weight", Doubled())
        parametrize.register_parametrization(model[1].bn2, "bias", Doubled())
    assert_as_original(results(before, x), results(original, x))
    for model in (before, original):
        for norm, name in ((model[0].bn1, "weight"), (model[1].bn2, "bias")):
            parametrize.remove_parametrizations(norm, name)
    assert_as_original(results(unfuse(before), x), results(original, x))


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.skipif(DEVICE.type != "cpu", reason="gloo, with a CPU for each process")
def test_data_parallel_processes_train_it(tmp_path: Path) -> None:
    """DistributedDataParallel and fully_shard, fused and not, on two processes."""
    from tests.fused_model_workers import work

    context = multiprocessing.get_context("spawn")
    backend = fused_ops.get_backend()
    processes = [context.Process(target=work, args=(rank, 2, str(tmp_path), backend)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    failures = [path.read_text() for path in sorted(tmp_path.glob("failure_*"))]
    assert not failures, "\n".join(failures)
    assert [process.exitcode for process in processes] == [0, 0]


class GoesByItsModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.extra = nn.LayerNorm(8), nn.Linear(8, 8)
        self.layers: Any = nn.Sequential(nn.Linear(8, 8))
        self.named = nn.ModuleDict({"inner": nn.ModuleList([nn.Linear(8, 8)])})

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *self.named["inner"]):  # type: ignore[misc]
            x = layer(x)
        if self.extra is not None:
            x = self.extra(x)
        return torch.relu(self.norm(x))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a container grows": lambda model: model.layers.append(nn.Tanh()),
    "a container in one grows": lambda model: model.named["inner"].append(nn.Tanh()),
    "another container": lambda model: setattr(model, "layers", nn.ModuleList([*model.layers, nn.Tanh()])),
    "none where one was": lambda model: setattr(model, "extra", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_goes_by_the_modules_of_its_moment(change: str) -> None:
    torch.manual_seed(0)
    model, x = GoesByItsModules().to(DEVICE), normal(3, 8)
    original = copy.deepcopy(model)
    torch.testing.assert_close(fuse(model)(x), original(x))
    for each in (model, original):
        CHANGES[change](each)
    torch.testing.assert_close(model(x), original(x))
