"""What lies between forward and backward: what is kept, who may change it, who may look at it, and where it may go."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fused_ops
from tests.calls import composed, fused, gradients, operands, recorded, scalar
from tests.every_norm import FUNCTIONS, PLACES, small_case
from tests.norm_cases import DEVICE, TORCH_ACTIVATIONS, Case, assert_same_bits, run_fused
from tests.row_norm_cases import FUNCTIONS as ROW_FUNCTIONS
from tests.row_norm_cases import make_case

pytestmark = pytest.mark.one_in(8)

Tensor = torch.Tensor

# No slope, a slope of two values, a slope that is computed again.
EACH_KIND = (None, "relu", "gelu")
TWO_VALUED = ("relu", "relu6", "leaky_relu")
OF_EITHER_LAYOUT = [("group_norm", 48), ("instance_norm", 48)]

QUICK_CHANNEL_NORMS = [
    ("instance_norm", True, "relu"),
    ("instance_norm", False, None),
    ("add_group_norm", True, "gelu"),
]


def kept_case(function: str, residual: bool, activation: str | None) -> Case:
    if function in ROW_FUNCTIONS:
        return make_case(function, 4, 16, residual=residual, activation=activation)
    return small_case(function, dtype=torch.float64, residual=residual, activation=activation)


EVERY_CASE = [
    pytest.param(
        kept_case(*place, activation),
        id=f"{place[0]}-{'residual' if place[1] else 'alone'}-{activation}",
        marks=[] if place[0] in ROW_FUNCTIONS or (*place, activation) in QUICK_CHANNEL_NORMS else pytest.mark.full,
    )
    for place, activation in itertools.product(PLACES, EACH_KIND)
]
every_case = pytest.mark.parametrize("case", EVERY_CASE)


def unchanged_gradients(case: Case) -> dict[str, Tensor]:
    return gradients(composed(case), operands(case))


def finish(outputs: tuple[Tensor, ...], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of scalar(outputs), the rest of `tests.calls.gradients` once the outputs are there."""
    return dict(zip(tensors, torch.autograd.grad(scalar(outputs), list(tensors.values())), strict=True))


# --- what is kept --------------------------------------------------------------------------------------------------


def distinct_bytes(kept: list[Tensor], case_tensors: dict[str, Tensor]) -> int:
    """But for parameters, which live in any case: torch's group_norm does not keep its bias."""
    parameters = {case_tensors[name].data_ptr() for name in ("weight", "bias") if name in case_tensors}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in kept}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)


def with_every_activation(places: list[tuple[str, bool]]) -> pytest.MarkDecorator:
    """All activations of the row norms, and one of each kind of the others; the rest in the long sweep."""
    return pytest.mark.parametrize(
        ("function", "residual", "activation"),
        [
            pytest.param(*place, activation, marks=[] if of_rows or activation in EACH_KIND else pytest.mark.full)
            for place, activation in itertools.product(places, (None, *TORCH_ACTIVATIONS))
            for of_rows in [place[0] in ROW_FUNCTIONS]
        ],
    )


@with_every_activation(PLACES)
def test_never_more_bytes_are_kept_than_torch_keeps(function, residual, activation, each_backend):
    case = small_case(function, 2, 64, residual=residual, activation=activation)
    tensors = operands(case)
    with recorded() as ours:
        fused(case)(*tensors.values())
    with recorded() as torchs:
        composed(case)(*tensors.values())
    assert 0 < distinct_bytes(ours, tensors) <= distinct_bytes(torchs, tensors)


@with_every_activation([place for place in PLACES if place[1]])
def test_the_kernels_keep_the_input_two_statistics_and_what_the_slope_needs(
    function, residual, activation, triton_backend
):
    case = small_case(function, 2, 64, residual=residual, activation=activation)
    tensors = operands(case)
    with recorded() as kept:
        outputs = fused(case)(*tensors.values())
    by_address = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    by_address[outputs[-1].data_ptr()] = "total" if case.adds_first else "y"
    own = [(*tensor.shape, str(tensor.dtype)) for tensor in kept if tensor.data_ptr() not in by_address]
    given = {by_address[tensor.data_ptr()] for tensor in kept if tensor.data_ptr() in by_address}

    statistics = [(case.statistics, "torch.float32")] * (1 if "rms" in function else 2)
    has_bits = activation in TWO_VALUED and not case.adds_first
    assert own == statistics + [(*case.mask_shape, "torch.uint8")] * has_bits
    recomputes_with_residual = activation is not None and not has_bits and not case.adds_first
    expected = {"total" if case.adds_first else "x"} | ({"residual"} if recomputes_with_residual else set())
    assert given - {"weight", "bias"} == expected


@every_case
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_where_no_gradient_can_come(case, mode, each_backend, family_calls):
    tensors = operands(case)
    with mode(), recorded() as kept:
        outputs = fused(case)(*tensors.values())
    assert kept == []
    assert not any(output.requires_grad for output in outputs)
    assert all(output.is_inference() == (mode is torch.inference_mode) for output in outputs)
    asked = [call.kwargs for call in family_calls]
    assert not any(kwargs.get("save_statistics") or kwargs.get("save_bits") for kwargs in asked)
    torch.testing.assert_close(outputs, composed(case)(*(tensor.detach() for tensor in tensors.values())))


def test_a_graph_is_freed_without_the_garbage_collector(triton_backend):
    case = make_case("add_layer_norm", 2, 4, activation="gelu")
    gc.disable()
    try:
        y, total = fused(case)(*operands(case).values())
        alive = weakref.ref(total.grad_fn)
        del y, total
        assert alive() is None, "the node holds itself, by way of the total that it keeps"
    finally:
        gc.enable()


# --- what users change ---------------------------------------------------------------------------------------------


def keeps_what_it_normalizes(case: Case) -> bool:
    """The composition of a channel norm may keep a copy of its own."""
    return fused_ops.get_backend() == "triton" or case.function in ROW_FUNCTIONS


@every_case
def test_a_tensor_changed_before_backward_raises_or_does_not_matter(case, each_backend):
    """Which of the two is our choice, except for x, total and weight: no way leads around them."""
    expected = unchanged_gradients(case)
    for name in operands(case):
        tensors = operands(case)
        outputs = fused(case)(*tensors.values())
        with torch.no_grad():
            tensors[name].mul_(2)
        try:
            found = finish(outputs, tensors)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), name
            continue
        if keeps_what_it_normalizes(case):
            assert name not in ({"weight"} if case.adds_first else {"weight", "x"}), f"{name} changed unnoticed"
        torch.testing.assert_close(found, expected)


@every_case
def test_an_output_changed_in_place_raises_or_has_torchs_gradients(case, each_backend):
    changes = {"add": lambda output: output.add_(1), "mul": lambda output: output.mul_(2), "zero": Tensor.zero_}
    for index, (name, change) in itertools.product(range(1 + case.adds_first), changes.items()):

        def then_changed(call, index=index, change=change):
            def function(*tensors: Tensor) -> tuple[Tensor, ...]:
                outputs = call(*tensors)
                change(outputs[index])
                return outputs

            return function

        def out_of_place(*tensors: Tensor, index=index, change=change) -> tuple[Tensor, ...]:
            outputs = list(composed(case)(*tensors))
            outputs[index] = change(outputs[index].clone())
            return tuple(outputs)

        expected = gradients(out_of_place, operands(case))
        try:
            found = gradients(then_changed(fused(case)), operands(case))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), (index, name)
            continue
        assert index == 0 or not keeps_what_it_normalizes(case), "total is kept for backward"
        torch.testing.assert_close(found, expected)


def test_the_kernels_let_users_change_y(triton_backend):
    """y is not kept, so that an in-place operation may follow, as after torch's own layer_norm."""
    for function, activation in itertools.product(FUNCTIONS, EACH_KIND):
        case = small_case(function, residual=True, activation=activation)
        tensors = operands(case)
        outputs = fused(case)(*tensors.values())
        outputs[0].add_(1)
        finish(outputs, tensors)


@every_case
@pytest.mark.parametrize("used", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["y", "total", "both"])
def test_gradients_of_x_and_residual_share_no_memory(case, used, each_backend):
    """The kernels write one tensor for both, but whoever scales x.grad in place must not scale residual.grad."""
    tensors = operands(case)
    outputs = fused(case)(*tensors.values())[used] or fused(case)(*tensors.values())
    arriving = [torch.ones_like(output) for output in outputs]
    torch.autograd.backward(outputs, arriving)
    given = [tensor.grad for tensor in tensors.values() if tensor.grad is not None]
    before = [gradient.clone() for gradient in given]
    for changed, gradient in enumerate(given):
        gradient.fill_(float("nan"))
        for other in range(changed + 1, len(given)):
            assert torch.equal(given[other], before[other])
    assert all(torch.equal(gradient, torch.ones_like(gradient)) for gradient in arriving), "dy belongs to the caller"


@every_case
def test_gradients_accumulate(case, each_backend):
    tensors = operands(case)
    expected = unchanged_gradients(case)
    for times in (1, 2, 3):
        scalar(fused(case)(*tensors.values())).backward()
        torch.testing.assert_close({n: t.grad for n, t in tensors.items()}, {n: times * g for n, g in expected.items()})


@every_case
def test_a_graph_is_walked_twice_only_if_retained(case, each_backend):
    tensors = operands(case)
    loss = scalar(fused(case)(*tensors.values()))
    first = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(tensors.values()))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, list(tensors.values()))


# --- who looks, and where it goes ----------------------------------------------------------------------------------


@every_case
def test_hooks_on_y_and_on_the_operands_see_and_replace_gradients(case, each_backend):
    """Not on total: what the norm sends back to it passes a hook in the composition and stays inside the kernels."""

    def hooked(call):
        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            inputs = [tensor * 1 for tensor in tensors]
            for tensor in inputs:
                tensor.register_hook(lambda gradient: gradient * 3)
            outputs = call(*inputs)
            outputs[0].register_hook(lambda gradient: gradient * 2)
            outputs[0].retain_grad()
            return outputs

        return function

    ours, torchs = (gradients(hooked(call(case)), operands(case)) for call in (fused, composed))
    torch.testing.assert_close(ours, torchs)


@every_case
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(case, use_reentrant, each_backend):
    def checkpointed(*tensors: Tensor) -> tuple[Tensor, ...]:
        return checkpoint(fused(case), *tensors, use_reentrant=use_reentrant)

    def loss_gradients(function) -> dict[str, Tensor | None]:
        tensors = operands(case)
        scalar(function(*tensors.values())).backward()
        return {name: tensor.grad for name, tensor in tensors.items()}

    plain, again = loss_gradients(fused(case)), loss_gradients(checkpointed)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@every_case
def test_saved_tensors_may_be_packed_and_moved(case, each_backend):
    """Packed to NumPy arrays, so that nothing but the values comes back, and by torch's own save_on_cpu."""
    expected = gradients(fused(case), operands(case))

    def unpack(packed: tuple) -> Tensor:
        array, device = packed
        return torch.from_numpy(array.copy()).to(device)

    arrays = torch.autograd.graph.saved_tensors_hooks(lambda t: (t.detach().cpu().numpy(), t.device), unpack)
    for hooks in (arrays, torch.autograd.graph.save_on_cpu(pin_memory=False)):
        tensors = operands(case)
        with hooks:
            outputs = fused(case)(*tensors.values())
        # An array comes back contiguous, where torch's elementwise operations may round otherwise.
        exact = {"rtol": 0, "atol": 0} if each_backend == "triton" else {}
        torch.testing.assert_close(finish(outputs, tensors), expected, **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_autocast_changes_nothing_but_what_torchs_would(case, dtype, each_backend):
    """On a CPU torch's autocast leaves these functions alone; on a GPU it has norms return float32."""
    cast = {name: None if (tensor := getattr(case, name)) is None else tensor.to(dtype) for name in ("x", "residual")}
    case = replace(case, **cast)

    def run(call) -> tuple[list[torch.dtype], dict[str, Tensor]]:
        tensors = operands(case)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            outputs = call(case)(*tensors.values())
            loss = scalar(outputs)
            found = torch.autograd.grad(loss, list(tensors.values()))
        return [output.dtype for output in outputs], dict(zip(tensors, found, strict=True))

    (ours, our_gradients), (torchs, torch_gradients) = run(fused), run(composed)
    in_float32 = DEVICE.type != "cpu" and not case.function.endswith(("batch_norm", "switch_norm"))
    assert ours[0] == (torch.float32 if in_float32 else torchs[0])
    assert all(our_gradients[name].dtype == tensor.dtype for name, tensor in torch_gradients.items())
    if DEVICE.type == "cpu":
        assert ours == torchs
        with torch.autocast(DEVICE.type, enabled=False):
            plain = gradients(fused(case), operands(case))
        assert all(torch.equal(plain[name], our_gradients[name]) for name in plain)


def test_backward_runs_on_another_thread(each_backend):
    """As under torch.nn.DataParallel or a pipeline, where who calls backward never saw the forward."""
    case = make_case("add_rms_norm", 4, 8, activation="silu")
    tensors = operands(case)
    loss = scalar(fused(case)(*tensors.values()))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    torch.testing.assert_close({name: tensor.grad for name, tensor in tensors.items()}, unchanged_gradients(case))


def test_anomaly_detection_finds_no_anomaly(each_backend):
    case = make_case("layer_norm", 4, 8, residual=True, activation="elu")
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        gradients(fused(case), operands(case))


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("function", "length"), [("layer_norm", 48), ("layer_norm", 20_000), *OF_EITHER_LAYOUT])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_was_saved_may_come_back_in_another_layout(function, length, activation, triton_backend) -> None:
    """A hook that packs may unpack to every second element of something: statistics and bits, too."""
    case = small_case(function, 2, length, residual=True, activation=activation)
    expected = run_fused(case)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: torch.stack((tensor, torch.zeros_like(tensor)), -1), lambda packed: packed[..., 0]
    ):
        assert_same_bits(run_fused(case), expected)
