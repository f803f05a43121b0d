"""The paper's way of training on NUS-WIDE, from its text (section 4, appendix A), with torch alone.

Files decoded by Pillow and augmented by torchvision's first transforms, ResNet-18 frozen by
`requires_grad` with its batch norms in training mode, float32, every item padded to 16 tags.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torchvision.models import resnet18

from loader import Setting
from magneto_dist.batch import Prediction
from magneto_dist.config_io import load_config
from magneto_dist.model.magneto import build_model
from other_loaders import PictureFiles

CONFIG = load_config(Path(__file__).parent.parent / "configs" / "nuswide.yaml")
BATCH = CONFIG.train.global_batch_size
NUM_CONCEPTS = 81
SLOTS = CONFIG.tags.max_tags


def important(num_tags: int) -> tuple[bool, ...]:
    """Most tags of NUS-WIDE's items are important ones."""
    return tuple(number != 1 for number in range(num_tags))


class Items(PictureFiles):
    """Pictures with their tags, added and dropped (section 5.1), in 16 slots."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Setting(folder, CONFIG.augment.image_size, True, BATCH, 0, ""))
        tags = json.loads((folder / "tags.json").read_text())
        self.tags = [tags[path.stem] for path in self.paths]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Pixels, tag ids and targets."""
        pairs = list(zip(self.tags[index], important(len(self.tags[index])), strict=True))
        dropped = np.random.randint(0, len(pairs) // 2 + 1)
        for _ in range(dropped):
            if rest := [pair for pair in pairs if not pair[1]]:
                pairs.remove(rest[0])
        added = np.random.choice(NUM_CONCEPTS, np.random.randint(0, len(pairs) // 2 + 1), False)
        present = {tag for tag, _ in pairs}
        pairs += [(tag, False) for tag in added.tolist() if tag not in present]
        ids, targets = torch.full((SLOTS,), NUM_CONCEPTS), torch.zeros(SLOTS)
        ids[: len(pairs)] = torch.tensor([tag for tag, _ in pairs])
        targets[: len(pairs)] = torch.tensor([float(flag) for _, flag in pairs])
        return super().__getitem__(index), ids, targets


def network_of_paper() -> nn.Module:
    """Figure 2 (d), the convolutional part as torchvision gives it."""
    plain = replace(CONFIG.model, backbone_weights="none", projection_batch_norm="local")
    network = build_model(plain, NUM_CONCEPTS)
    backbone = nn.Sequential(*list(resnet18().children())[:-2])
    network.image_stream.backbone = backbone.requires_grad_(False)  # type: ignore[union-attr]
    return network.train()


def loss_of_paper(prediction: Prediction, targets: Tensor, mask: Tensor) -> Tensor:
    """BCE and Dice of the mixture and of both streams (section 3.2)."""
    total = torch.zeros(())
    for head in prediction.heads:
        p = prediction.probability(head) * mask
        bce = functional.binary_cross_entropy(p, targets, reduction="none")
        dice = 1 - (2 * (p * targets).sum(1) + 1) / (p.sum(1) + targets.sum(1) + 1)
        total = total + (bce * mask).sum() / mask.sum() + dice.mean()
    return total


def forward_backward_of_paper(network: nn.Module, item: list[Tensor]) -> float:
    """The loss, whose gradients are added."""
    pixels, ids, targets = item
    mask = ids != NUM_CONCEPTS
    loss = loss_of_paper(network(ids, mask, pixels), targets, mask)
    loss.backward()
    return loss.item()


def optimizer_of_paper(network: nn.Module) -> torch.optim.Optimizer:
    """SGD of appendix A."""
    return torch.optim.SGD(network.parameters(), lr=CONFIG.optim.lr, momentum=CONFIG.optim.momentum)


def batches_of_paper(folder: Path, workers: int, steps: int) -> DataLoader:
    """So many batches of the pictures in `folder`, in random order."""
    items = Subset(Items(folder), range(steps * BATCH))
    return DataLoader(items, BATCH, shuffle=True, num_workers=workers)
