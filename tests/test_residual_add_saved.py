"""What residual_add keeps between forward and backward, who may change it, and where it may go."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_ops import functional as F
from fused_ops import reference
from tests.calls import gradients, recorded, scalar
from tests.layouts import channels_last
from tests.norm_cases import DEVICE, TORCH_ACTIVATIONS, normal, short, torch_activate, with_fields
from tests.residual_add_cases import (
    EACH_KIND,
    AddCase,
    composed,
    fused,
    make_case,
    operands,
    run_fused,
    run_reference,
    with_layout,
)

pytestmark = pytest.mark.one_in(8)

Tensor = torch.Tensor

TWO_VALUED = ("relu", "relu6", "leaky_relu")
WAYS: dict[str, dict[str, Any]] = {
    "bare": {},
    "scaled": {"scale": (8,)},
    "dropped": {"dropout_p": 0.3, "drop_path_p": 0.3},
    "everything": {"scale": (8,), "dropout_p": 0.3, "drop_path_p": 0.3},
}
every_kind = pytest.mark.parametrize("activation", EACH_KIND)
each_way = pytest.mark.parametrize("way", WAYS)


def way_case(way: str, activation: str | None, rows: int = 6, **fields: Any) -> AddCase:
    return make_case(rows, 8, activation=activation, **WAYS[way], **fields)


def finish(outputs: tuple[Tensor, ...], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(tensors, torch.autograd.grad(scalar(outputs), list(tensors.values())), strict=True))


# --- what is kept --------------------------------------------------------------------------------------------------


def kept_by_kernels(case: AddCase) -> set[tuple[Any, ...]]:
    """Names of operands, and shapes and types of all else."""
    tensors = operands(case)
    with recorded() as kept:
        fused(case)(*tensors.values())
    names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    return {names.get(t.data_ptr(), (tuple(t.shape), short(t.dtype))) for t in kept}


SEED = ((1,), "int64")
BITS = ((6,), "uint8")  # an eighth of a byte for each of 48 elements


@pytest.mark.parametrize(
    ("way", "activation", "expected"),
    [
        ("bare", None, set()),
        ("bare", "relu", {BITS}),
        ("bare", "gelu", {"x", "residual"}),
        ("scaled", None, {"x", "scale"}),
        ("scaled", "relu", {"x", "scale", BITS}),
        ("scaled", "gelu", {"x", "residual", "scale"}),
        ("dropped", None, {SEED}),
        ("dropped", "relu", {SEED, BITS}),
        ("dropped", "gelu", {SEED, "x", "residual"}),
        ("everything", None, {SEED, "x", "scale"}),
        ("everything", "relu", {SEED, "x", "scale", BITS}),
        ("everything", "gelu", {SEED, "x", "residual", "scale"}),
    ],
)
def test_the_kernels_keep_what_a_gradient_depends_on(way, activation, expected, triton_backend):
    """No mask of what is dropped but the eight bytes it follows from, and of a slope of two values a bit an element."""
    assert kept_by_kernels(way_case(way, activation)) == expected


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_every_activation_keeps_bits_or_its_inputs(activation, triton_backend):
    expected = {BITS} if activation in TWO_VALUED else {"x", "residual"}
    assert kept_by_kernels(way_case("bare", activation)) == expected


@pytest.mark.parametrize("frozen", [("x",), ("residual",), ("scale",), ("x", "residual"), ("x", "scale")], ids="-".join)
@every_kind
def test_a_frozen_operand_is_kept_only_where_another_gradient_needs_it(activation, frozen, triton_backend):
    case = way_case("everything", activation, frozen=frozen)
    expected = {SEED}
    if activation == "gelu" or not {"x", "scale"} <= set(frozen):
        expected.add("scale")
    if activation == "relu":
        expected.add(BITS)
    if activation == "gelu":
        expected |= {"x", "residual"}
    if "scale" not in frozen:
        expected.add("x")
    assert kept_by_kernels(case) == expected


def storages(kept: list[Tensor], without: list[Tensor]) -> int:
    """Bytes of distinct memory, that of `without` not counted."""
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in kept}
    return sum(storage.nbytes() for address, storage in found.items() if address not in known)


def torchs(case: AddCase) -> Any:
    """The call as torch's users write it, whose dropout keeps what it multiplies by."""

    def function(x: Tensor, residual: Tensor, scale: Tensor | None = None) -> tuple[Tensor]:
        branch = torch.nn.functional.dropout(x, case.dropout_p) if case.dropout_p else x
        branch = branch if scale is None else branch * scale
        if case.drop_path_p:
            ones = branch.new_ones(len(x), *[1] * (x.dim() - 1))
            branch = branch * torch.nn.functional.dropout(ones, case.drop_path_p)
        return (torch_activate(residual + branch, case.activation),)

    return function


def kept_bytes(case: AddCase, call: Any, *known: str) -> int:
    tensors = operands(case)
    with recorded() as kept:
        call(*tensors.values())
    return storages(kept, [tensors[name] for name in known if name in tensors])


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("activation", [None, *TORCH_ACTIVATIONS])
@each_way
def test_a_call_never_keeps_more_memory_of_its_own_than_torchs(way, activation, dtype, each_backend):
    """The operands are the caller's: they are all that is kept for a slope that is computed again, and no sum is."""
    case = way_case(way, activation, rows=128, dtype=dtype)
    ours, eager = (kept_bytes(case, call, *operands(case)) for call in (fused(case), torchs(case)))
    assert ours <= eager
    if each_backend == "triton":
        assert ours == (case.x.numel() // 8 if activation in TWO_VALUED else 0) + (8 if case.drops else 0)


@pytest.mark.parametrize("activation", [None, *TWO_VALUED])
@each_way
def test_a_call_never_keeps_more_than_torchs_in_all(way, activation, each_backend):
    """Operands included, but for the scale. Of a slope that is computed again two stand for torch's one sum."""
    case = way_case(way, activation, rows=128)
    ours, eager = (kept_bytes(case, call, "scale") for call in (fused(case), torchs(case)))
    assert ours <= eager


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=short)
def test_a_bare_sum_keeps_nothing(dtype, each_backend):
    for residual_dtype in (dtype, torch.float32):
        case = make_case(6, 8, dtype=dtype, residual_dtype=residual_dtype)
        tensors = operands(case)
        with recorded() as kept:
            (y,) = fused(case)(*tensors.values())
        assert kept == [] and y.requires_grad


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_way
@every_kind
def test_nothing_is_kept_where_no_gradient_can_come(activation, way, mode, each_backend):
    case = way_case(way, activation)
    tensors = operands(case)
    with mode(), recorded() as kept:
        (y,) = fused(case)(*tensors.values())
    assert kept == [] and not y.requires_grad and y.is_inference() == (mode is torch.inference_mode)
    (expected,) = fused(case)(*tensors.values())
    torch.testing.assert_close(y, expected.detach())


# --- the bits ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("memory_checked")
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (5, 20), (3, 683), (2, 3, 5, 7)], ids=short)
@pytest.mark.parametrize("activation", TWO_VALUED)
def test_bits_are_where_y_lies(activation, shape, triton_backend):
    """An eighth of a byte an element, the lowest first, in the order of y's memory; set where the slope is 1."""
    for layout in (torch.clone, channels_last) if len(shape) == 4 else (torch.clone,):
        case = with_layout(make_case(*shape, activation=activation), layout)
        with recorded() as kept:
            fused(case)(*operands(with_fields(case, frozen=())).values())
        (bits,) = kept
        assert bits.shape == (-(-case.x.numel() // 8),)
        z = run_reference(with_fields(case, activation=None)).outputs["y"]
        passes = reference.activation_slope(z.numpy(), activation) == 1.0
        in_memory = passes.transpose(0, 2, 3, 1) if layout is channels_last else passes
        unpacked = np.unpackbits(bits.cpu().numpy(), bitorder="little")[: passes.size].astype(bool)
        np.testing.assert_array_equal(unpacked, in_memory.ravel())


@pytest.mark.parametrize("activation", TWO_VALUED)
def test_the_slope_at_nan_is_torchs(activation, triton_backend):
    """Of one element: torch's own relu6 passes it there, and stops it where it works on vectors."""
    case = make_case(1, activation=activation)
    case = with_fields(case, residual=torch.full_like(case.x, torch.nan))
    z = torch.full_like(case.x, torch.nan, requires_grad=True)
    (expected,) = torch.autograd.grad(torch_activate(z, activation), z, case.dy)
    assert torch.equal(run_fused(case).gradients["dx"], expected)


# --- what users change ---------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@each_way
@every_kind
def test_a_tensor_changed_before_backward_raises_or_does_not_matter(activation, way, each_backend):
    case = way_case(way, activation)
    expected = gradients(composed(case), operands(case))
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
        torch.testing.assert_close(found, expected)


@pytest.mark.one_in(2)
@each_way
@every_kind
def test_the_kernels_let_users_change_y(activation, way, triton_backend):
    case = way_case(way, activation)
    expected = gradients(lambda *t: (2 * fused(case)(*t)[0],), operands(case))
    tensors = operands(case)
    (y,) = fused(case)(*tensors.values())
    torch.testing.assert_close(finish((y.mul_(2),), tensors), expected)


@pytest.mark.one_in(2)
@each_way
@every_kind
def test_gradients_of_x_and_residual_share_no_memory(activation, way, each_backend):
    """One tensor serves for both, but whoever scales x.grad in place must not scale residual.grad, nor y's."""
    case = way_case(way, activation)
    tensors = operands(case)
    (y,) = fused(case)(*tensors.values())
    arriving = torch.ones_like(y)
    y.backward(arriving)
    given = [tensor.grad for tensor in tensors.values()]
    before = [gradient.clone() for gradient in given]
    for changed, gradient in enumerate(given):
        gradient.fill_(float("nan"))
        for other in range(changed + 1, len(given)):
            assert torch.equal(given[other], before[other])
    assert torch.equal(arriving, torch.ones_like(arriving)), "dy belongs to the caller"


@pytest.mark.one_in(2)
@each_way
@every_kind
def test_gradients_accumulate_and_a_graph_is_walked_again_if_retained(activation, way, each_backend):
    case = way_case(way, activation)
    tensors = operands(case)
    expected = gradients(composed(case), operands(case))
    loss = scalar(fused(case)(*tensors.values()))
    for times in (1, 2):
        loss.backward(retain_graph=True)
        torch.testing.assert_close({n: t.grad for n, t in tensors.items()}, {n: times * g for n, g in expected.items()})


def test_a_graph_is_freed_without_the_garbage_collector(triton_backend):
    gc.disable()
    try:
        case = way_case("everything", "gelu")
        (y,) = fused(case)(*operands(case).values())
        alive = weakref.ref(y.grad_fn)
        del y
        assert alive() is None
    finally:
        gc.enable()


# --- where it may go -----------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("use_reentrant", [False, True])
@each_way
@every_kind
def test_checkpointing_draws_the_same_again(activation, way, use_reentrant, each_backend):
    """And moves torch's generator once, as the call alone does."""
    case = way_case(way, activation)

    def call(*tensors: Tensor) -> Tensor:
        return F.residual_add(*tensors[:2], scale=tensors[2] if len(tensors) > 2 else None, **case.keywords)

    def run(function: Any) -> tuple[list[Tensor], Tensor]:
        tensors = operands(case)
        torch.manual_seed(1)
        y = function(*tensors.values())
        following = torch.rand(3, device=DEVICE)
        scalar((y,)).backward()
        return [y.detach(), *(tensor.grad for tensor in tensors.values())], following

    plain, after = run(call)
    again, after_again = run(lambda *tensors: checkpoint(call, *tensors, use_reentrant=use_reentrant))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert torch.equal(after, after_again)


@every_kind
def test_saved_tensors_may_be_packed_and_moved(activation, each_backend):
    """To NumPy arrays, so that nothing but the values comes back, and to every second element of something."""
    case = way_case("everything", activation)
    expected = gradients(fused(case), operands(case))
    hooks: list[tuple[Any, Any]] = [
        (lambda t: t.detach().cpu().numpy(), lambda array: torch.from_numpy(array.copy()).to(DEVICE)),
        (lambda t: torch.stack((t, torch.zeros_like(t)), -1), lambda packed: packed[..., 0]),
    ]
    for pack, unpack in hooks:
        tensors = operands(case)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            outputs = fused(case)(*tensors.values())
        exact = {"rtol": 0, "atol": 0} if each_backend == "triton" else {}
        torch.testing.assert_close(finish(outputs, tensors), expected, **exact)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_autocast_changes_nothing(dtype, activation, each_backend):
    """torch's sums and products keep their types under it, so nothing is cast."""
    case = way_case("everything", activation, dtype=dtype, scale_dtype=torch.float32, residual_dtype=torch.float32)
    plain = gradients(fused(case), operands(case))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = gradients(fused(case), operands(case))
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())


def test_backward_runs_on_another_thread(each_backend):
    case = way_case("everything", "silu")
    tensors = operands(case)
    loss = scalar(fused(case)(*tensors.values()))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    expected = gradients(composed(case), operands(case))
    torch.testing.assert_close({name: tensor.grad for name, tensor in tensors.items()}, expected)


def test_hooks_on_y_see_and_replace_its_gradient(each_backend):
    for case in itertools.starmap(way_case, itertools.product(WAYS, EACH_KIND)):

        def hooked(call: Any) -> Any:
            def function(*tensors: Tensor) -> tuple[Tensor, ...]:
                (y,) = call(*tensors)
                y.register_hook(lambda gradient: gradient * 3)
                return (y,)

            return function

        ours, torchs = (gradients(hooked(call(case)), operands(case)) for call in (fused, composed))
        torch.testing.assert_close(ours, torchs)


def test_anomaly_detection_finds_no_anomaly(each_backend):
    case = way_case("everything", "elu")
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        gradients(fused(case), operands(case))


def test_a_stream_of_blocks_learns(each_backend):
    """Two blocks of a pre-norm Transformer, where the one's sum is the other's residual."""
    weights = [normal(8, 8, seed=seed).requires_grad_() for seed in (0, 1)]
    scales = [normal(8, seed=seed).requires_grad_() for seed in (2, 3)]
    leaves = [*weights, *scales]

    def loss(add: Any) -> Tensor:
        stream = normal(6, 8, seed=4)
        for weight, scale in zip(weights, scales, strict=True):
            stream = add(torch.tanh(stream @ weight), stream, scale)
        return scalar((stream,))

    ours = torch.autograd.grad(loss(lambda x, stream, scale: F.residual_add(x, stream, scale=scale)), leaves)
    torchs = torch.autograd.grad(loss(lambda x, stream, scale: stream + scale * x), leaves)
    torch.testing.assert_close(ours, torchs)
