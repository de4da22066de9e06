"""fuse on models of torchvision, timm and transformers with random weights; skipped where their library is not."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fused_ops import fuse, fusion_report, unfuse

Tensor = torch.Tensor

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE_SIZE = 48


def library(name: str) -> Any:
    """The library, or a skip."""
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


@pytest.fixture(scope="module", autouse=True)
def operators_of_torchvision():
    """timm imports torchvision, whose wheel for CUDA beside a CPU torch lacks operators of detection that its import
    looks for."""
    with contextlib.suppress(ImportError):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            definitions = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                definitions.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            importlib.import_module("torchvision")
            yield definitions  # they are there as long as this is
            return
    yield None


def transformer(model: str, config: str, **options: Any) -> torch.nn.Module:
    transformers = library("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def tokens(**more: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(24).view(2, 12) % 40, **more}


def image() -> tuple[Tensor]:
    return (torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE),)


MODELS: dict[str, tuple[Any, Any, bool, dict[str, int]]] = {
    "torchvision resnet18": (
        lambda: library("torchvision").models.resnet18(),
        image,
        False,
        {"norm+relu": 9, "norm+add+relu": 8, "norm": 3},
    ),
    "timm resnet18": (
        lambda: library("timm").create_model("resnet18"),
        image,
        False,
        {"norm+relu": 9, "norm+add+relu": 8, "norm": 3},
    ),
    "timm mobilenetv3": (
        lambda: library("timm").create_model("mobilenetv3_small_050"),
        image,
        False,
        {"norm+hardswish": 18, "norm+relu": 5, "norm": 4, "norm+add": 7},
    ),
    "timm convnext": (lambda: library("timm").create_model("convnext_atto"), image, False, {"norm": 17}),
    "timm ViT": (
        lambda: library("timm").create_model("vit_tiny_patch16_224", img_size=IMAGE_SIZE, depth=3),
        image,
        False,
        {"norm": 4, "add+norm": 3},
    ),
    "torchvision swin": (
        lambda: library("torchvision").models.swin_t(),
        image,
        False,
        {"norm": 17, "add+norm": 12},
    ),
    "bert": (
        lambda: transformer("BertModel", "BertConfig", vocab_size=40, **SMALL),
        tokens,
        True,
        {"add+norm": 5},
    ),
    "llama": (
        lambda: transformer("LlamaModel", "LlamaConfig", vocab_size=40, num_key_value_heads=2, **SMALL),
        lambda: tokens(use_cache=False),
        True,
        {"norm": 3, "add+norm": 2},
    ),
    "t5": (
        lambda: transformer("T5EncoderModel", "T5Config", vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2),
        tokens,
        False,
        {"norm": 5},
    ),
}


def called(model: torch.nn.Module, given: Any) -> list[Tensor]:
    given = copy.deepcopy(given)
    out = model(**given) if isinstance(given, dict) else model(*given)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def trained(model: torch.nn.Module, given: Any) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    torch.manual_seed(3)
    left: list[Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()
        outputs = called(model.train(), given)
        loss = sum((out * torch.linspace(0, 7, out.numel()).cos().view_as(out)).mean() for out in outputs)
        loss.backward()  # type: ignore[union-attr]
        left += [
            *(out.detach() for out in outputs),
            *(p.grad.clone() for p in model.parameters() if p.grad is not None),
        ]
        optimizer.step()
    with torch.no_grad():
        return [*left, *(b.clone() for b in model.buffers()), *called(model.eval(), given), torch.rand(2)]


@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_trains_as_the_original(name: str) -> None:
    make, inputs, with_example, patterns = MODELS[name]
    torch.manual_seed(0)
    model, given = make(), inputs()
    original = copy.deepcopy(model)
    fuse(model, given if with_example else None)
    report = fusion_report(model)
    assert [entry for entry in report if not entry.fused] == []
    assert Counter(entry.pattern for entry in report) == patterns
    for ours, expected in zip(trained(model, given), trained(original, given), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * max(1.0, float(expected.abs().max())))
    unfuse(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
