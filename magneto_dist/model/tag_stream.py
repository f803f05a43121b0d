"""Tags -> features, from the tags alone (paper, section 3.1)."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from magneto_dist.config import ModelConfig
from magneto_dist.model.encoder import TransformerEncoder


class TagEmbedding(nn.Module):
    """Tag embedder: a trained vector per tag; zero, and never trained, for padding.

    Both streams of MAGNeto read the same embedding. Dropout follows it, as the paper uses one
    dropout value "for the whole architecture" (appendix A.3).

    Args:
        num_tags: size of the vocabulary, and the id of padding.
        config: d_model, dropout.
    """

    def __init__(self, num_tags: int, config: ModelConfig) -> None:
        super().__init__()
        self.vectors = nn.Embedding(num_tags + 1, config.d_model, padding_idx=num_tags)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tag_ids: Int64[Tensor, "batch slot"]) -> Float[Tensor, "batch slot d_model"]:
        """The vector of every slot."""
        return self.dropout(self.vectors(tag_ids))


class TagStream(nn.Module):
    """The textual stream: a Transformer encoder of M layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = TransformerEncoder(config, config.tag_layers)

    def forward(
        self, tags: Float[Tensor, "batch slot d_model"], tag_mask: Bool[Tensor, "batch slot"]
    ) -> Float[Tensor, "batch slot d_model"]:
        """Features of every slot, ready for the head and the gate."""
        return self.encoder(tags, tag_mask)
