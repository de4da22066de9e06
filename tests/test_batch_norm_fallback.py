"""Batch normalization as torch's function composes it: its numbers, and right where its own are not."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as TF
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

from fused_ops import functional as F
from fused_ops import reference
from tests.batch_norm_calls import call, composed, each_mode, every_function, statistics
from tests.calls import recorded, scalar
from tests.channel_norm_calls import LAYOUTS, adds_first, channels_last, gradients, order, tensors
from tests.layouts import transposed
from tests.norm_cases import DEVICE, HALF, TORCH_ACTIVATIONS, normal, same_bits
from tests.tolerances import assert_within_budget

pytestmark = pytest.mark.one_in(8)

Tensor = torch.Tensor


in_torch = pytest.mark.usefixtures("torch_backend")


# --- numbers -------------------------------------------------------------------------------------------------------

SHAPES = [(5, 6), (2, 6, 4), (1, 6, 7), (2, 5, 3, 3), (1, 3, 1, 2), (2, 3, 2, 3, 2)]


@pytest.mark.one_in(3)
@each_mode
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_function
def test_values_and_gradients_are_those_of_the_formula(function, shape, activation, affine, training, each_backend):
    ours, formula = tensors(*shape, affine=affine), tensors(*shape, affine=affine)
    outputs, expected = (run(function, training, activation)(*t) for run, t in ((call, ours), (composed, formula)))
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients(outputs, ours), gradients(expected, formula))


@each_mode
@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
@every_function
def test_every_activation_is_torchs(function, activation, training, each_backend):
    leaves = tensors(3, 6, 4)
    outputs, expected = (run(function, training, activation)(*leaves) for run in (call, composed))
    torch.testing.assert_close(outputs, expected)


@each_mode
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
@every_function
def test_y_and_running_statistics_are_torchs(function, momentum, layout, training, each_backend):
    ours, torchs = statistics(4), statistics(4)
    for seed in range(2):
        x, residual, weight, bias = (tensor.detach() for tensor in tensors(3, 4, 5, 2, seed=seed))
        run = call(function, training, running=ours, momentum=momentum, eps=0.1)
        y, *_ = run(LAYOUTS[layout](x), residual if adds_first(function) else None, weight, bias)
        total = residual + x if adds_first(function) else x
        expected = TF.batch_norm(total, *torchs, weight, bias, training, momentum, 0.1)
        torch.testing.assert_close((y, *ours), (expected, *torchs), rtol=1e-12, atol=1e-12)


TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, None)


@in_torch
@each_mode
@pytest.mark.parametrize("x_dtype", TYPES[:4], ids=str)
@pytest.mark.parametrize("weight_dtype", TYPES, ids=str)
@every_function
def test_every_mixture_of_types_returns_xs(function, x_dtype, weight_dtype, training):
    """And leaves running statistics theirs, without a history."""
    x, residual, *_ = tensors(3, 6, 4, dtype=x_dtype)
    for bias_dtype, running_dtype in itertools.product((torch.bfloat16, torch.float32, None), TYPES):
        if not training and running_dtype is None:
            continue
        weight, bias = (
            None if dtype is None else normal(6, dtype=dtype, seed=seed).requires_grad_()
            for seed, dtype in enumerate((weight_dtype, bias_dtype))
        )
        leaves = [x, residual, weight, bias]
        running = None if running_dtype is None else statistics(6, running_dtype)
        before = None if running is None else tuple(tensor.clone() for tensor in running)
        outputs = call(function, training, running=running)(*leaves)
        assert {output.dtype for output in outputs} == {x_dtype}
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if x_dtype in HALF else {}
        torch.testing.assert_close(outputs, composed(function, training, running=before)(*leaves), **tolerance)
        given = [leaf for leaf in leaves if leaf is not None]
        assert [g.dtype for g in gradients(outputs, leaves)] == [leaf.dtype for leaf in given]
        if running is None:
            continue
        assert all(tensor.dtype == running_dtype and not tensor.requires_grad for tensor in running)
        moved = tuple(tensor.double() for tensor in before)
        if training:
            TF.batch_norm((x + residual if adds_first(function) else x).detach().double(), *moved, training=True)
        loose = {"rtol": 1e-6, "atol": 1e-6} if running_dtype == torch.float64 and x_dtype != torch.float64 else {}
        torch.testing.assert_close(running, tuple(tensor.to(running_dtype) for tensor in moved), **loose)


@in_torch
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_float32_residual_makes_a_float32_total(dtype):
    x, _, weight, bias = tensors(2, 6, 4, dtype=dtype)
    residual = normal(2, 6, 4, seed=9).requires_grad_()
    y, total = call("add_batch_norm")(x, residual, weight, bias)
    assert (y.dtype, total.dtype) == (dtype, torch.float32) and torch.equal(total, residual + x)
    dx, dresidual = torch.autograd.grad(scalar((y, total)), (x, residual))
    assert (dx.dtype, dresidual.dtype) == (dtype, torch.float32)


@in_torch
@each_mode
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("mean", "deviation", "dtype"),
    [(1e4, 1e-2, torch.float32), (1e1, 1.0, torch.float32), (10, 1.0, torch.float16), (10, 1.0, torch.bfloat16)],
    ids=str,
)
def test_a_large_mean_costs_no_more_digits_than_torchs_own(mean, deviation, dtype, layout, training):
    x, dy, weight, bias = (tensor.detach() for tensor in tensors(2, 8, 16, 16, dtype=dtype))
    x = LAYOUTS[layout]((mean + deviation * x.double()).to(dtype))
    running = tuple(t.to(DEVICE, dtype) for t in (torch.full((8,), float(mean)), torch.full((8,), deviation**2)))
    given = []
    for norm, wide in (
        (lambda r, x, w, b: F.batch_norm(x, *r, w, b, training), False),
        (lambda r, x, w, b: TF.batch_norm(x, *r, w, b, training), False),
        (lambda r, x, w, b: composed("batch_norm", training, running=r)(x, None, w, b)[0], True),
    ):
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in (x, weight, bias)]
        y = norm(tuple(t.double() if wide else t.clone() for t in running), *leaves)
        given.append((y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    for name, actual, of_torch, expected in zip(("y", "dx", "dweight", "dbias"), *given, strict=True):
        terms = 512 if name in ("dweight", "dbias") else 1
        assert_within_budget(f"batch_norm {name}", actual, of_torch, expected.detach().numpy(force=True), terms)


@in_torch
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_parameters_cost_the_statistics_no_digits(dtype):
    """torch's CPU kernel keeps mean and rstd in the type of the parameters: at this mean its dweight is off by 3 of 60
    in bfloat16."""
    x, dy, weight, bias = (tensor.detach() for tensor in tensors(2, 8, 16, 16, dtype=dtype))
    x = x + 10
    running = statistics(8, dtype)
    narrow, wide = ([t.to(kind).requires_grad_() for t in (x, weight, bias)] for kind in (dtype, torch.float64))
    found = torch.autograd.grad(F.batch_norm(narrow[0], *running, *narrow[1:], True), narrow, dy)
    expected = torch.autograd.grad(TF.batch_norm(wide[0], None, None, *wide[1:], True), wide, dy.double())
    for gradient, exact in zip(found, expected, strict=True):
        assert (gradient - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which interprets the kernels, warns of Inf - Inf
@each_mode
@every_function
def test_nan_and_infinity_stay_in_their_channel(function, training, each_backend):
    x, residual, weight, bias = (tensor.detach() for tensor in tensors(2, 6, 4))
    x[0, 0, 0], x[1, 5, 0] = torch.nan, torch.inf
    running, of_torch = statistics(6), statistics(6)
    y = call(function, training, running=running)(x, residual, weight, bias)[0]
    expected = composed(function, training)(x, residual, weight, bias)[0]
    assert y.isnan().any() and y.isfinite().any()
    torch.testing.assert_close(y, expected, equal_nan=True)
    TF.batch_norm(residual + x if adds_first(function) else x, *of_torch, training=training)
    # An infinite mean is NaN where it is found in more than one step, as on a GPU torch's own.
    each = [[torch.where(found.isfinite(), found, torch.nan) for found in both] for both in (running, of_torch)]
    torch.testing.assert_close(*each, equal_nan=True)


# --- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(8)
@each_mode
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(2, 6), (2, 6, 4), (2, 6, 3, 4), (2, 3, 2, 3, 2), (1, 6, 3, 4), (2, 1, 3, 4)], ids=str
)
@every_function
def test_the_layout_in_is_the_layout_out(function, layout, shape, training, each_backend):
    x, residual, weight, bias = (tensor.detach() for tensor in tensors(*shape))
    x = LAYOUTS[layout](x)
    expected = call(function, training)(x.contiguous(), residual, weight, bias)
    before = x.clone()
    for other in (residual, LAYOUTS[layout](residual), channels_last(residual)):
        for needs in (False, True):
            outputs = call(function, training, "relu")(x.detach().requires_grad_(needs), other, weight, bias)
            if other is residual:
                torch.testing.assert_close(outputs[0], expected[0].relu())
            if adds_first(function) and 0 in x.stride():
                continue  # whose order of dims is the residual's to decide
            expected_orders = [order(torch.empty_like(x))]
            if each_backend == "triton" and layout == "reversed dims":  # a kernel writes one of two
                expected_orders = [
                    order(dense(torch.empty(shape))) for dense in (torch.Tensor.contiguous, channels_last)
                ]
            for output in outputs:
                assert order(output) in expected_orders, (output.stride(), x.stride())
    assert same_bits(x, before)


@pytest.mark.one_in(8)
@each_mode
@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 5), (1, 4, 3, 5), (2, 4, 3, 5), (2, 4, 2, 3, 3)], ids=str)
def test_dy_may_have_another_layout(shape, layout, dy_layout, training, each_backend):
    x, dy, weight, bias = (tensor.detach() for tensor in tensors(*shape))
    leaves = [LAYOUTS[layout](x).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    dy = LAYOUTS[dy_layout](dy)
    found, expected = (
        torch.autograd.grad(run("batch_norm", training)(leaves[0], None, *leaves[1:])[0], leaves, dy)
        for run in (call, composed)
    )
    torch.testing.assert_close(found, expected)


def alike_but_for_lone_elements(tensor: Tensor) -> Tensor:
    """Channels last, in strides of a (3, 31, 16, 1) by which torch suggests that they are not."""
    return channels_last(tensor).as_strided(tensor.shape, (496, 1, 31, 496))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("layout", "dy_layout"),
    [
        (torch.clone, alike_but_for_lone_elements),
        (alike_but_for_lone_elements, torch.clone),
        (transposed, channels_last),
    ],
    ids=lambda layout: layout.__name__,
)
def test_dims_of_one_element_may_have_any_stride(layout, dy_layout, activation, each_backend):
    """torch's own CPU kernel then takes tensors of two layouts for ones of one: its dx is off by 8 of 10."""
    x, dy, weight, bias = (tensor.detach() for tensor in tensors(3, 31, 16, 1))
    leaves = [layout(x).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = F.batch_norm(leaves[0], None, None, *leaves[1:], True, activation=activation)
    found = torch.autograd.grad(y, leaves, dy_layout(dy))
    arrays = (tensor.numpy(force=True) for tensor in (dy, x))
    parameters = (tensor.numpy(force=True) for tensor in (weight, bias))
    expected = reference.batch_norm_backward(*arrays, None, None, *parameters, True, activation=activation)
    for name, gradient in zip(("dx", "dweight", "dbias"), found, strict=True):
        torch.testing.assert_close(gradient.cpu(), torch.as_tensor(expected[name]))


@each_mode
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("needs", [False, True])
@every_function
def test_no_argument_is_changed(function, activation, needs, training, each_backend):
    """y is finished in place, and must be no other tensor's memory: not where types, layouts and copies are trivial."""
    for dtype, shape in itertools.product((torch.float32, torch.float64), ((1, 4, 2), (2, 4, 3, 3))):
        given = [tensor.detach().requires_grad_(needs) for tensor in tensors(*shape, dtype=dtype)]
        running = torch.zeros(4, device=DEVICE, dtype=dtype), torch.ones(4, device=DEVICE, dtype=dtype)
        before = [tensor.clone() for tensor in (*given, *running)]
        call(function, training, activation, running if not training else None)(*given)
        assert all(same_bits(tensor, copy) for tensor, copy in zip((*given, *running), before, strict=True))


@each_mode
@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 4), (2, 0, 4), (2, 6, 0), (2, 6, 0, 3), (0, 6, 0)], ids=str)
@every_function
def test_empty_tensors_have_empty_or_zero_gradients(function, shape, training, each_backend):
    """torch fails where there is no channel. Running statistics stay, as torch's do."""
    leaves, running, before = tensors(*shape), statistics(shape[1]), statistics(shape[1])
    outputs = call(function, training, "gelu", running)(*leaves)
    assert [output.shape for output in outputs] == [torch.Size(shape)] * len(outputs)
    for leaf, gradient in zip(leaves, gradients(outputs, leaves), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()
    assert all(map(torch.equal, running, before))


# --- what is kept --------------------------------------------------------------------------------------------------


@in_torch
@pytest.mark.parametrize("parameters", ["both", "bias", "neither"])
@pytest.mark.parametrize(("training", "tracked"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_is_kept_than_by_torch(dtype, tracked, parameters, training):
    x = normal(2, 6, 8, 8, dtype=dtype).requires_grad_()
    weight = normal(6).requires_grad_() if parameters == "both" else None
    bias = normal(6, seed=1).requires_grad_() if parameters in ("both", "bias") else None
    running = statistics(6, torch.float32) if tracked else (None, None)
    kept = []
    for function in (F.batch_norm, TF.batch_norm):
        with recorded() as tensors_kept:
            _y = function(x, *running, weight, bias, training)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors_kept}
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    assert kept[0] <= kept[1]


@in_torch
def test_x_is_kept_only_for_who_needs_it():
    bias = normal(6).requires_grad_()
    for training in (True, False):
        with recorded() as kept:
            _y = call("batch_norm", training)(normal(2, 6, 8, 8), None, None, bias)
        assert sum(tensor.nbytes for tensor in kept) < 2 * 6 * 8 * 8


# --- whose node it is ----------------------------------------------------------------------------------------------


@in_torch
@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the node is always ours")
@pytest.mark.parametrize(
    ("shape", "changed", "is_torchs"),
    [
        ((3, 4, 2, 5), {}, True),
        ((1, 4, 3), {}, True),
        ((3, 4), {"bias": None}, True),
        ((3, 4, 1, 5), {}, False),
        ((3, 4, 5), {"weight": normal(4, 2)[:, 0].requires_grad_()}, False),
        ((3, 4, 5), {"weight": None}, False),
        ((3, 4, 5), {"x": normal(3, 4, 5), "weight": normal(4)}, False),
    ],
    ids=str,
)
def test_torchs_node_is_left_where_its_gradients_are_right(shape, changed, is_torchs):
    found = dict(zip(("x", "_", "weight", "bias"), tensors(*shape), strict=True)) | changed
    given = (found["x"].to(torch.float32), *statistics(4, torch.float32))
    parameters = [None if each is None else each.to(torch.float32) for each in (found["weight"], found["bias"])]
    y = F.batch_norm(*given, *parameters, training=True)
    assert (y.grad_fn.name() == "NativeBatchNormBackward0") == is_torchs
    with torch.autograd.graph.save_on_cpu():
        y = F.batch_norm(*given, *parameters, training=True)
    assert y.grad_fn.name() != "NativeBatchNormBackward0"


@in_torch
def test_x_is_freed_by_backward_while_y_lives():
    leaf, _, weight, bias = tensors(3, 4, 5)
    x = leaf * 2
    alive = torch._C._WeakTensorRef(x)
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    del x
    assert not alive.expired()
    torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert alive.expired()


@in_torch
def test_what_is_checkpointed_is_differentiated_twice():
    leaves = [leaf for leaf in tensors(3, 4, 5) if leaf is not None]
    x, _, weight, bias = leaves

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, training=True)

    second = []
    for run in (norm, lambda *given: checkpoint(norm, *given, use_reentrant=False)):
        (dx,) = torch.autograd.grad(run(x, weight, bias).pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), (x, weight)))
    torch.testing.assert_close(*second)


@in_torch
def test_a_hook_on_the_node_has_the_last_word():
    x, _, weight, bias = tensors(3, 4, 5)
    y = F.batch_norm(x, None, None, weight, bias, training=True)
    seen: list[Tensor] = []
    y.grad_fn.register_hook(lambda found, _: seen.append(found[0]) or tuple(2 * each for each in found))
    for create_graph in (False, True, False):
        dx, *_ = torch.autograd.grad(y.pow(3).sum(), (x, weight, bias), retain_graph=True, create_graph=create_graph)
        torch.testing.assert_close(dx, 2 * seen[-1])
    torch.testing.assert_close(seen, [seen[0]] * 3)


@in_torch
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its compiler asks for it
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_compiled_backward_finds_the_same(layout, create_graph):
    found = []
    for compiled in (False, True):
        leaf, _, weight, bias = tensors(3, 4, 5, 5)
        x = LAYOUTS[layout](leaf)
        y = F.batch_norm(x, None, None, weight, bias, training=True)
        with compiled_autograd._enable(torch.compile(backend="eager")) if compiled else contextlib.nullcontext():
            y.contiguous().pow(3).sum().backward(create_graph=create_graph)
        found.append((leaf.grad, weight.grad, bias.grad))
    torch.testing.assert_close(*found)
