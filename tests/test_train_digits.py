"""The training comparison: both twins are the same model, and learn the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import train_digits
from benchmarks.models import MODELS


def test_the_twins_learn_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train_digits.main(["--steps", "4", "--device", "cpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("digits-vit-cpu-*.json")
    result = json.loads(path.read_text())
    plain, fused = (result["losses"][name] for name in (train_digits.PLAIN, train_digits.FUSED))
    assert len(plain) == len(fused) == 4
    # Four steps do not amplify: each loss is a mean over a batch of values of some units, rounded a few dozen times.
    assert result["largest_difference"] <= 100 * torch.finfo(torch.float32).eps * max(plain)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    out = capfd.readouterr().out
    assert "largest difference" in out and "accuracy" in out and "time of a step" in out


def test_the_plain_twin_is_of_torch_nn_alone() -> None:
    plain, fused = MODELS["vit"].build(seed=0)
    assert not any(type(module).__module__.startswith("fused_ops") for module in plain.modules())
    norms = Counter(type(module).__name__ for module in fused.modules() if "Norm" in type(module).__name__)
    assert norms == {"LayerNorm": 1, "AddLayerNorm": 5}
    assert all(type(m).__module__.startswith("fused_ops") for m in fused.modules() if "Norm" in type(m).__name__)
    for name, parameter in plain.state_dict().items():
        assert torch.equal(parameter, fused.state_dict()[name])


def test_batches_are_whole_and_the_same_for_a_seed() -> None:
    first, again = (list(train_digits.batches(300, 5, seed=3)) for _ in range(2))
    assert [len(batch) for batch in first] == [128] * 5
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(set(torch.cat(first[:2]).tolist())) == 256  # an epoch repeats no image
