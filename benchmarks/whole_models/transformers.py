"""Transformers as their authors have them, of torch.nn alone: what a user brings to fuse."""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from ..models import Attention, PlainBlock


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., arXiv:2010.11929): patches of 16 x 16, a class token, pre-norm blocks."""

    def __init__(self, image: int, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 16, 16)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image // 16) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(PlainBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class LlamaRMSNorm(nn.Module):
    """transformers' own, by what it computes an RMS norm in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(TF.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """A decoder block of Llama; rotary positions, which no norm sees, are left out."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(width)
        self.self_attn = Attention(width, heads)
        self.post_attention_layernorm = LlamaRMSNorm(width)
        self.mlp = LlamaMLP(width, inner)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.self_attn(self.input_layernorm(hidden_states))
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
        return residual + hidden_states


def llama(width: int, heads: int, inner: int, blocks: int = 2) -> nn.Module:
    """Blocks of Llama and the norm behind the last."""
    return nn.Sequential(*(LlamaBlock(width, heads, inner) for _ in range(blocks)), LlamaRMSNorm(width))
