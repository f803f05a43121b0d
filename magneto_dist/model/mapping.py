"""Beyond the paper, off by default: another mapping from tags to the image (paper, section 6)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class BilinearMapping(nn.Module):
    """m = LayerNorm((W t + b) * a), t a tag's vector, a what it sees in the regions, * by element.

    As published, the image stream knows a tag only by where it looks: of two tags that look at the
    same regions it cannot tell which is which. The product tells it, without a branch in which tags
    could pass by the image. It is a low-rank bilinear product (Kim et al., "Hadamard Product for
    Low-rank Bilinear Pooling", ICLR 2017) whose other factor is the output projection of the
    attention; a layer norm stands in place of their last projection.

    Args:
        d_model: features of tags and regions.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.projection = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(
        self, tags: Float[Tensor, "batch slot d_model"], seen: Float[Tensor, "batch slot d_model"]
    ) -> Float[Tensor, "batch slot d_model"]:
        """Features of every slot, ready for the encoder."""
        return self.norm(self.projection(tags) * seen)
