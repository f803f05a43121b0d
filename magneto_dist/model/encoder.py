"""Transformer encoder over an item's tags (paper, section 3.1)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

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

    packs: bool
    """Whether a CPU computes on the tags that are there, and not on padding."""

    def __init__(self, config: ModelConfig, num_layers: int) -> None:
        super().__init__()
        self.packs = False
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
        # A GPU would have to wait until it is known how many tags there are.
        if self.packs and x.device.type == "cpu":
            return torch.relu(self._packed(x, tag_mask, padding))
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return torch.relu(x)

    def _packed(
        self,
        x: Float[Tensor, "batch slot d_model"],
        tag_mask: Bool[Tensor, "batch slot"],
        padding: Bool[Tensor, "batch slot"],
    ) -> Float[Tensor, "batch slot d_model"]:
        """The layers on the tags alone, one after the other in a row; zero where there is none."""
        places = tag_mask.flatten().nonzero().squeeze(1)
        tags = x.flatten(0, 1)[places]
        for layer in self.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            seen = _packed_attention(layer.self_attn, tags, places, padding)
            tags = layer.norm1(tags + layer.dropout1(seen))
            inner = layer.linear2(layer.dropout(torch.relu(layer.linear1(tags))))
            tags = layer.norm2(tags + layer.dropout2(inner))
        return _unpacked(tags, places, padding)


def pack_tags(model: nn.Module) -> None:
    """Lets the encoders of `model` compute on tags alone: faster on a CPU where lists are short.

    The same to rounding; dropout, drawn for the tags alone, draws other numbers. Not for FSDP and
    DeepSpeed: they bring weights to a module that is called, and here the layers are not.
    """
    for module in model.modules():
        if isinstance(module, TransformerEncoder):
            module.packs = True


def _packed_attention(
    attention: nn.MultiheadAttention,
    tags: Float[Tensor, "tag d_model"],
    places: Int64[Tensor, " tag"],
    padding: Bool[Tensor, "batch slot"],
) -> Float[Tensor, "tag d_model"]:
    """`attention` among the tags of each item: projections packed, what lies between padded."""
    projected = linear(tags, attention.in_proj_weight, attention.in_proj_bias)
    heads = _unpacked(projected, places, padding).unflatten(2, (3, attention.num_heads, -1))
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    seen = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=~padding[:, None, None],
        dropout_p=attention.dropout if attention.training else 0.0,
    )
    return attention.out_proj(seen.transpose(1, 2).flatten(2).flatten(0, 1)[places])


def _unpacked(
    tags: Float[Tensor, "tag feature"],
    places: Int64[Tensor, " tag"],
    padding: Bool[Tensor, "batch slot"],
) -> Float[Tensor, "batch slot feature"]:
    """Tags in their slots, zeros in the others."""
    slots = tags.new_zeros(padding.numel(), tags.shape[1])
    return slots.index_copy(0, places, tags).unflatten(0, padding.shape)


def attention_padding(tag_mask: Bool[Tensor, "batch slot"]) -> Bool[Tensor, "batch slot"]:
    """Slots that no tag may attend to: those without a tag.

    An item without any tag keeps its first slot: a softmax over nothing is NaN, and a NaN reaches
    every parameter even where the item's own loss weighs zero.
    """
    is_first = torch.arange(tag_mask.shape[1], device=tag_mask.device) == 0
    has_no_tag = ~tag_mask.any(dim=1, keepdim=True)
    return ~(tag_mask | (has_no_tag & is_first))
