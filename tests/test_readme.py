"""The example of the README runs, and is what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

README = Path(__file__).resolve().parent.parent / "README.md"


class TorchBlock(nn.Module):
    """The block of the README as one writes it with torch.nn."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


def test_the_basic_block_is_that_of_torch_nn() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "class BasicBlock" in block)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(example, names)
    torch.manual_seed(0)
    plain, fused = TorchBlock(4), names["BasicBlock"](4)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 5, 5)
    for training in (True, False):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        expected, actual = (block.train(training)(own) for block, own in zip((plain, fused), inputs, strict=True))
        torch.testing.assert_close(actual, expected)
        actual.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value)
