"""The whole forward pass against a second implementation by plain loops over float64 numbers.

The reference reads the weights by name and uses no layer of torch; it takes over only the features
that the backbone gives (those are compared with torchvision's in test_backbone.py).
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from magneto_dist.config import ModelConfig
from magneto_dist.model.magneto import build_model

Array = NDArray[np.float64]
CONFIG = ModelConfig(
    d_model=8,
    num_heads=2,
    d_ff=12,
    dropout=0.3,
    image_layers=2,
    tag_layers=3,
    backbone="resnet18",
    backbone_stages=2,
)
NUM_TAGS = 9


class Weights:
    """Tensors of a state_dict below a prefix."""

    def __init__(self, state: dict[str, torch.Tensor], prefix: str = "") -> None:
        self.state, self.prefix = state, prefix

    def __getitem__(self, name: str) -> Array:
        return self.state[self.prefix + name].numpy()

    def below(self, name: str) -> "Weights":
        return Weights(self.state, f"{self.prefix}{name}.")


def linear(x: Array, weight: Array, bias: Array) -> Array:
    return np.array([sum(w * v for w, v in zip(row, x, strict=True)) for row in weight]) + bias


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0)


def layer_norm(x: Array, w: Weights) -> Array:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + 1e-5) * w["weight"] + w["bias"]


def attention(queries: list[Array], keys: list[Array], w: Weights) -> list[Array]:
    """Scaled dot-product attention of several heads; `keys` are the values too."""
    d = CONFIG.d_model
    size = d // CONFIG.num_heads
    weight, bias = w["in_proj_weight"], w["in_proj_bias"]
    q = [linear(x, weight[:d], bias[:d]) for x in queries]
    k = [linear(x, weight[d : 2 * d], bias[d : 2 * d]) for x in keys]
    v = [linear(x, weight[2 * d :], bias[2 * d :]) for x in keys]
    outputs = []
    for query in q:
        heads = []
        for head in range(CONFIG.num_heads):
            part = slice(head * size, (head + 1) * size)
            scores = [float(query[part] @ key[part]) / math.sqrt(size) for key in k]
            weights = [math.exp(score) for score in scores]
            heads.append(sum(a * x[part] for a, x in zip(weights, v, strict=True)) / sum(weights))
        joined = np.concatenate(heads)
        outputs.append(linear(joined, w["out_proj.weight"], w["out_proj.bias"]))
    return outputs


def encoder(tags: list[Array], w: Weights, num_layers: int) -> list[Array]:
    for index in range(num_layers):
        layer = w.below(f"layers.{index}")
        seen = attention(tags, tags, layer.below("self_attn"))
        tags = [layer_norm(x + y, layer.below("norm1")) for x, y in zip(tags, seen, strict=True)]
        inner = [relu(linear(x, layer["linear1.weight"], layer["linear1.bias"])) for x in tags]
        outer = [linear(x, layer["linear2.weight"], layer["linear2.bias"]) for x in inner]
        tags = [layer_norm(x + y, layer.below("norm2")) for x, y in zip(tags, outer, strict=True)]
    return [relu(x) for x in tags]


def regions(features: Array, w: Weights) -> list[Array]:
    """1x1 convolution and batch norm in evaluation mode, position by position."""
    norm = w.below("projection_norm")
    scale = norm["weight"] / np.sqrt(norm["running_var"] + 1e-5)
    kernel = w["projection.weight"][:, :, 0, 0]
    _, height, width = features.shape
    return [
        (linear(features[:, i, j], kernel, np.zeros(len(kernel))) - norm["running_mean"]) * scale
        + norm["bias"]
        for i in range(height)
        for j in range(width)
    ]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def product(tag: Array, seen: Array, w: Weights) -> Array:
    """Beyond the paper: a tag's projection times what it sees."""
    projected = linear(tag, w["projection.weight"], w["projection.bias"])
    return layer_norm(
        np.array([t * a for t, a in zip(projected, seen, strict=True)]), w.below("norm")
    )


def reference(
    tag_ids: list[int], features: Array, w: Weights, bilinear: bool
) -> list[dict[str, float]]:
    """Probabilities of every tag of one item without padding."""
    tags = [w["tag_embedding.vectors.weight"][tag] for tag in tag_ids]
    image = w.below("image_stream")
    seen = attention(tags, regions(features, image), image.below("attention"))
    if bilinear:
        seen = [product(t, a, image.below("product")) for t, a in zip(tags, seen, strict=True)]
    image_features = encoder(seen, image.below("encoder"), CONFIG.image_layers)
    tag_features = encoder(tags, w.below("tag_stream.encoder"), CONFIG.tag_layers)
    results = []
    for x, y in zip(image_features, tag_features, strict=True):
        hidden = relu(
            linear(np.concatenate([x, y]), w["gate.layers.1.weight"], w["gate.layers.1.bias"])
        )
        alpha = sigmoid(linear(hidden, w["gate.layers.4.weight"], w["gate.layers.4.bias"])[0])
        p_image = sigmoid(linear(x, w["image_head.weight"], w["image_head.bias"])[0])
        p_tag = sigmoid(linear(y, w["tag_head.weight"], w["tag_head.bias"])[0])
        final = alpha * p_image + (1 - alpha) * p_tag
        results.append({"alpha": alpha, "image": p_image, "tag": p_tag, "final": final})
    return results


@pytest.mark.parametrize("mapping", ["attention", "bilinear"])
@pytest.mark.parametrize("grad", [True, False], ids=["graph", "fused kernels"])
def test_magneto_is_what_the_paper_says_and_what_goes_beyond_it(grad: bool, mapping: str) -> None:
    torch.manual_seed(3)
    model = build_model(replace(CONFIG, mapping=mapping), NUM_TAGS).double().eval()
    norm, product = model.image_stream.projection_norm, model.image_stream.product
    trained = [] if product is None else [product.norm.weight, product.norm.bias]
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var, *trained):
            tensor.uniform_(0.5, 2)
    items = [[1, 4, 7], [0, 8, 3, 2, 5], [6]]
    tag_ids = torch.full((3, 5), NUM_TAGS)
    for row, item in enumerate(items):
        tag_ids[row, : len(item)] = torch.tensor(item)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.set_grad_enabled(grad):
        got = model(tag_ids, tag_ids != NUM_TAGS, pixels)
        features = model.image_stream.backbone(pixels)
        grid = model.image_stream.regions(pixels, None)
    weights = Weights(model.state_dict())
    expected_grid = regions(features[0].detach().numpy(), weights.below("image_stream"))
    np.testing.assert_allclose(grid[0].detach().numpy(), expected_grid, rtol=1e-9, atol=1e-12)
    for row, item in enumerate(items):
        own_features = features[row].detach().numpy()
        expected_item = reference(item, own_features, weights, mapping == "bilinear")
        for slot, expected in enumerate(expected_item):
            assert got.alpha[row, slot].item() == pytest.approx(expected["alpha"], rel=1e-9)
            for head in ("final", "image", "tag"):
                value = got.probability(head)[row, slot].item()
                assert value == pytest.approx(expected[head], rel=1e-9), (row, slot, head)


def test_ff_is_residual_blocks_tag_by_tag() -> None:
    torch.manual_seed(3)
    config = ModelConfig(kind="ff", d_model=8, d_ff=12, tag_layers=2)
    model = build_model(config, NUM_TAGS).double().eval()
    weights = Weights(model.state_dict())
    got = model(torch.arange(NUM_TAGS)[None], torch.ones(1, NUM_TAGS, dtype=torch.bool))
    for tag in range(NUM_TAGS):
        x = weights["tag_embedding.vectors.weight"][tag]
        for index in range(2):
            block = weights.below(f"blocks.{index}")
            inner = relu(linear(x, block["layers.0.weight"], block["layers.0.bias"]))
            outer = linear(inner, block["layers.3.weight"], block["layers.3.bias"])
            x = layer_norm(x + outer, block.below("norm"))
        logit = linear(relu(x), weights["tag_head.weight"], weights["tag_head.bias"])[0]
        assert got.tag_logits[0, tag].item() == pytest.approx(logit, rel=1e-9)
