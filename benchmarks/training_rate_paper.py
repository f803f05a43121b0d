"""The paper's way of training, from its text (sections 3 to 5, appendix A), with torch alone.

Files decoded by Pillow and augmented by torchvision's first transforms; a ResNet whose first blocks
are frozen by `requires_grad` alone, all its batch norms in training mode; float32, every item
padded to l tags.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torchvision.models import get_model

from magneto_dist.batch import Prediction
from magneto_dist.config import ModelConfig
from magneto_dist.model.magneto import build_model
from other_loaders import PictureFiles
from our_loaders import Setting
from training_rate_data import Case

_STEM = 4  # children of torchvision's ResNets before the first block

Tags = list[tuple[int, bool]]
"""Ids, each with whether it is important."""


class Items(PictureFiles):
    """Pictures with their tags, added and dropped (section 5.1), in l slots."""

    def __init__(self, case: Case) -> None:
        augment, self.settings = case.config.augment, case.config.tags
        has_policy = augment.policy != "none"
        super().__init__(Setting(case.folder, augment.image_size, has_policy, case.batch, 0, ""))
        tags = json.loads((case.folder / "tags.json").read_text())
        self.tags: list[Tags] = [tags[path.stem] for path in self.paths]
        self.num_tags = case.set_up.num_tags

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Pixels, tag ids and targets."""
        slots = self.settings.max_tags
        tags = self._added_and_dropped(self.tags[index])[:slots]
        ids, targets = torch.full((slots,), self.num_tags), torch.zeros(slots)
        ids[: len(tags)] = torch.tensor([tag for tag, _ in tags])
        targets[: len(tags)] = torch.tensor([float(is_important) for _, is_important in tags])
        return super().__getitem__(index), ids, targets

    def _added_and_dropped(self, tags: Tags) -> Tags:
        unimportant = [tag for tag, is_important in tags if not is_important]
        most_dropped = int(self.settings.beta_drop * len(unimportant))
        dropped = set(random.sample(unimportant, random.randint(0, most_dropped)))
        added = random.randint(0, int(self.settings.beta_add * len(unimportant)))
        present = {tag for tag, _ in tags}
        # So many that enough are left without those that the item has.
        drawn = random.sample(range(self.num_tags), added + len(present))
        new = [tag for tag in drawn if tag not in present][:added]
        return [pair for pair in tags if pair[0] not in dropped] + [(tag, False) for tag in new]


def network_of_paper(case: Case) -> nn.Module:
    """Figure 2 (d), the convolutional part as torchvision gives it."""
    model = case.config.model
    plain = replace(model, projection_batch_norm="local")
    network = build_model(plain, case.set_up.num_tags)
    backbone = nn.Sequential(*list(get_model(model.backbone, weights=None).children())[:-2])
    frozen_part(backbone, model).requires_grad_(False)
    network.image_stream.backbone = backbone  # type: ignore[union-attr]
    return network.train()


def frozen_part(backbone: nn.Sequential, model: ModelConfig) -> nn.Sequential:
    """The first children of a ResNet, as many as `model` freezes."""
    if model.frozen_stages == "all":
        return backbone
    return backbone[: _STEM + model.frozen_stages - 1] if model.frozen_stages else backbone[:0]


def loss_of_paper(prediction: Prediction, targets: Tensor, mask: Tensor) -> Tensor:
    """BCE and Dice of the mixture and of both streams (section 3.2)."""
    total = torch.zeros(())
    for head in prediction.heads:
        p = prediction.probability(head) * mask
        bce = functional.binary_cross_entropy(p, targets, reduction="none")
        dice = 1 - (2 * (p * targets).sum(1) + 1) / (p.sum(1) + targets.sum(1) + 1)
        total = total + (bce * mask).sum() / mask.sum() + dice.mean()
    return total


def forward_backward_of_paper(network: nn.Module, case: Case, item: list[Tensor]) -> float:
    """The loss, whose gradients are added."""
    pixels, ids, targets = item
    mask = ids != case.set_up.num_tags
    loss = loss_of_paper(network(ids, mask, pixels), targets, mask)
    loss.backward()
    return loss.item()


def optimizer_of_paper(network: nn.Module, case: Case) -> torch.optim.Optimizer:
    """SGD of appendix A."""
    optim = case.config.optim
    return torch.optim.SGD(network.parameters(), lr=optim.lr, momentum=optim.momentum)


def batches_of_paper(case: Case, workers: int, steps: int) -> DataLoader:
    """So many batches of the pictures, in random order; more than an epoch has show some twice."""
    num_items = case.steps * case.batch
    items = Subset(Items(case), [number % num_items for number in range(steps * case.batch)])
    return DataLoader(items, case.batch, shuffle=True, num_workers=workers)
