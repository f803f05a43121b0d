"""The three baselines of figure 2 (a to c): one stream each (paper, section 4.2).

Parts that MAGNeto has too bear the same names, so that weights can move between them. All forward
passes take the arguments of MAGNeto; what a baseline does not use is ignored.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from magneto_dist.batch import Prediction
from magneto_dist.config import ModelConfig
from magneto_dist.model.image_stream import ImageStream
from magneto_dist.model.tag_stream import TagEmbedding, TagStream


class FeedForward(nn.Module):
    """FF, figure 2 (a): feed-forward blocks with residual connections, every tag for itself.

    "Only using tag information", and examining it "shows us that the relations among tags are
    extremely significant": so FF has no path between tags, and TF-t is FF with its blocks replaced
    by the Transformer encoder. A block therefore is the encoder layer without its attention, and
    the same ReLU follows the last one.

    Args:
        config: d_model, d_ff, dropout, tag_layers (number of blocks).
        num_tags: size of the vocabulary.
    """

    def __init__(self, config: ModelConfig, num_tags: int) -> None:
        super().__init__()
        self.tag_embedding = TagEmbedding(num_tags, config)
        self.blocks = nn.Sequential(*(_ResidualBlock(config) for _ in range(config.tag_layers)))
        self.tag_head = nn.Linear(config.d_model, 1)

    def forward(
        self,
        tag_ids: Int64[Tensor, "batch slot"],
        tag_mask: Bool[Tensor, "batch slot"],
        pixels: UInt8[Tensor, "batch 3 height width"] | None = None,
        sample_valid: Bool[Tensor, " batch"] | None = None,
        features: Float[Tensor, "batch region channel"] | None = None,
    ) -> Prediction:
        """Logits of the tag head."""
        features = torch.relu(self.blocks(self.tag_embedding(tag_ids)))
        return Prediction(tag_logits=self.tag_head(features).squeeze(-1))


class TagTransformer(nn.Module):
    """TF-t, figure 2 (b): the tag stream of MAGNeto with a head.

    Args:
        config: as for `TagStream`.
        num_tags: size of the vocabulary.
    """

    def __init__(self, config: ModelConfig, num_tags: int) -> None:
        super().__init__()
        self.tag_embedding = TagEmbedding(num_tags, config)
        self.tag_stream = TagStream(config)
        self.tag_head = nn.Linear(config.d_model, 1)

    def forward(
        self,
        tag_ids: Int64[Tensor, "batch slot"],
        tag_mask: Bool[Tensor, "batch slot"],
        pixels: UInt8[Tensor, "batch 3 height width"] | None = None,
        sample_valid: Bool[Tensor, " batch"] | None = None,
        features: Float[Tensor, "batch region channel"] | None = None,
    ) -> Prediction:
        """Logits of the tag head."""
        features = self.tag_stream(self.tag_embedding(tag_ids), tag_mask)
        return Prediction(tag_logits=self.tag_head(features).squeeze(-1))


class ImageTagTransformer(nn.Module):
    """TF-it, figure 2 (c): the image stream of MAGNeto with a head.

    Args:
        config: as for `ImageStream`.
        num_tags: size of the vocabulary.
    """

    def __init__(self, config: ModelConfig, num_tags: int) -> None:
        super().__init__()
        self.tag_embedding = TagEmbedding(num_tags, config)
        self.image_stream = ImageStream(config)
        self.image_head = nn.Linear(config.d_model, 1)

    def forward(
        self,
        tag_ids: Int64[Tensor, "batch slot"],
        tag_mask: Bool[Tensor, "batch slot"],
        pixels: UInt8[Tensor, "batch 3 height width"] | None = None,
        sample_valid: Bool[Tensor, " batch"] | None = None,
        features: Float[Tensor, "batch region channel"] | None = None,
    ) -> Prediction:
        """Logits of the image head."""
        tags = self.tag_embedding(tag_ids)
        features = self.image_stream(tags, tag_mask, pixels, sample_valid, features)
        return Prediction(image_logits=self.image_head(features).squeeze(-1))


class _ResidualBlock(nn.Module):
    """x -> LayerNorm(x + Dropout(W2 Dropout(ReLU(W1 x + b1)) + b2)), tag by tag."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(config.d_model, config.d_ff),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.d_ff, config.d_model),
            nn.Dropout(config.dropout),
        )
        self.norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x: Float[Tensor, "batch slot d_model"]
    ) -> Float[Tensor, "batch slot d_model"]:
        return self.norm(x + self.layers(x))
