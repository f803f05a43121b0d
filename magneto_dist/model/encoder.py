"""Transformer encoder over an item's tags (paper, section 3.1)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from magneto_dist.config import ModelConfig


class TransformerEncoder(nn.Module):
    """Identical layers of self-attention and feed-forward network, then a ReLU.

    The layers are `nn.TransformerEncoderLayer` as published by Vaswani et al.: post-norm, ReLU
    inside, dropout on attention weights, inside the feed-forward network and on both residual
    branches. Each is initialised on its own (`nn.TransformerEncoder` starts them as copies of one).
    A tag list is a set, so there is no positional encoding. The paper is silent on what follows the
    last layer; we take a ReLU.

    Args:
        config: d_model, num_heads, d_ff, dropout.
        num_layers: N of the image stream, M of the tag stream.
    """

    def __init__(self, config: ModelConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.d_model, config.num_heads, config.d_ff, config.dropout, batch_first=True
            )
            for _ in range(num_layers)
        )

    def forward(
        self, x: Float[Tensor, "batch slot d_model"], tag_mask: Bool[Tensor, "batch slot"]
    ) -> Float[Tensor, "batch slot d_model"]:
        """Features of every slot in the light of the item's other tags; padding is not attended."""
        padding = attention_padding(tag_mask)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return torch.relu(x)


def attention_padding(tag_mask: Bool[Tensor, "batch slot"]) -> Bool[Tensor, "batch slot"]:
    """Slots that no tag may attend to: those without a tag.

    An item without any tag keeps its first slot: a softmax over nothing is NaN, and a NaN reaches
    every parameter even where the item's own loss weighs zero.
    """
    is_first = torch.arange(tag_mask.shape[1], device=tag_mask.device) == 0
    has_no_tag = ~tag_mask.any(dim=1, keepdim=True)
    return ~(tag_mask | (has_no_tag & is_first))
