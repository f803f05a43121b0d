"""The gating layer that weighs the two streams (paper, table 1)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from magneto_dist.config import ModelConfig


class Gate(nn.Module):
    """Table 1: dropout, FC to d_ff, ReLU, dropout, FC to 1, squeeze; alpha = sigmoid(output).

    alpha weighs the image stream (equation 1). The sigmoid is left to `Prediction`, which mixes the
    streams in log space.

    Args:
        config: d_model, d_ff, dropout.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(2 * config.d_model, config.d_ff),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.d_ff, 1),
        )

    def forward(
        self,
        image_features: Float[Tensor, "batch slot d_model"],
        tag_features: Float[Tensor, "batch slot d_model"],
    ) -> Float[Tensor, "batch slot"]:
        """Logits of alpha, from the outputs of both encoders concatenated along the last axis."""
        return self.layers(torch.cat([image_features, tag_features], dim=-1)).squeeze(-1)
