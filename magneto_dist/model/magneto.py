"""MAGNeto, figure 2 (d), and `build_model`, which makes it or one of its baselines.

1. Tags are embedded once, for both streams.
2. The image stream and the tag stream make features of every tag; a head each makes a logit.
3. The gate reads both features; `Prediction` mixes the heads' probabilities by it (equation 1).
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from magneto_dist.batch import Prediction
from magneto_dist.config import ModelConfig
from magneto_dist.model.baselines import FeedForward, ImageTagTransformer, TagTransformer
from magneto_dist.model.gate import Gate
from magneto_dist.model.image_stream import ImageStream
from magneto_dist.model.tag_stream import TagEmbedding, TagStream

PRETRAINED_PARTS = ("tag_embedding.", "image_stream.", "tag_stream.")
"""Prefixes in a state_dict of what fine-tuning takes over from pre-training (section 5.2): image
feature extractor, tag embedder, multi-head attention, both encoders; heads and gate are new."""


class MAGNeto(nn.Module):
    """Two streams and a gate (paper, section 3.1).

    Every part starts from torch's default initialisation, so `torch.manual_seed` determines it.

    Args:
        config: sizes, backbone, dropout.
        num_tags: size of the vocabulary.
        gate: False: the two-output network of pre-training (section 5.2).

    Raises:
        InputError: as for `build_backbone`.
    """

    def __init__(self, config: ModelConfig, num_tags: int, gate: bool = True) -> None:
        super().__init__()
        self.tag_embedding = TagEmbedding(num_tags, config)
        self.image_stream = ImageStream(config)
        self.tag_stream = TagStream(config)
        self.image_head = nn.Linear(config.d_model, 1)
        self.tag_head = nn.Linear(config.d_model, 1)
        self.gate = Gate(config) if gate else None

    def forward(
        self,
        tag_ids: Int64[Tensor, "batch slot"],
        tag_mask: Bool[Tensor, "batch slot"],
        pixels: UInt8[Tensor, "batch 3 height width"] | None = None,
        sample_valid: Bool[Tensor, " batch"] | None = None,
        features: Float[Tensor, "batch region channel"] | None = None,
    ) -> Prediction:
        """Logits of both heads and of the gate; those of slots without a tag mean nothing.

        Args:
            tag_ids: padding id (the number of tags) where `tag_mask` is False.
            tag_mask: True where the slot holds a tag.
            pixels: RGB of 0 to 255, not normalised.
            sample_valid: rows that count; in training the others stay out of batch statistics.
                None: all rows.
            features: `pixels` as the frozen stages have seen them before, see `frozen_regions`.

        Raises:
            InputError: as for `ImageStream.forward`.
        """
        tags = self.tag_embedding(tag_ids)
        image_features = self.image_stream(tags, tag_mask, pixels, sample_valid, features)
        tag_features = self.tag_stream(tags, tag_mask)
        return Prediction(
            image_logits=self.image_head(image_features).squeeze(-1),
            tag_logits=self.tag_head(tag_features).squeeze(-1),
            gate_logits=None if self.gate is None else self.gate(image_features, tag_features),
        )


def build_model(config: ModelConfig, num_tags: int, *, gate: bool = True) -> nn.Module:
    """The network of `config.kind`, in training mode, float32, on the CPU.

    Args:
        config: `tag_embedding_init` is not applied here: see `load_tag_embedding`.
        num_tags: size of the vocabulary.
        gate: False: pre-training, where MAGNeto has two outputs; baselines never have a gate.

    Raises:
        InputError: as for `build_backbone`.
    """
    baselines = {"ff": FeedForward, "tf-t": TagTransformer, "tf-it": ImageTagTransformer}
    if config.kind in baselines:
        return baselines[config.kind](config, num_tags)
    return MAGNeto(config, num_tags, gate)
