"""A trained model as a folder that the Hugging Face Hub, and everybody, can read.

    config.json         what the model is, how its input is prepared and its output is used
    model.safetensors   plain weights under the names of the network's state_dict
    vocabulary.txt      one tag a line; line number from 0 = id
    README.md           model card

`huggingface_hub`'s mixin writes and uploads it; reading is our own, for the mixin takes weights
without the vocabulary, which alone says what they mean, and pickles where there is no safetensors.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jaxtyping import Bool, Int64, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from magneto_dist.batch import Prediction
from magneto_dist.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    TagsConfig,
    TrainConfig,
)
from magneto_dist.decision import Decision
from magneto_dist.errors import InputError
from magneto_dist.model_card import model_card
from magneto_dist.trained_run import TrainedRun, load_model, load_run
from magneto_dist.vocabulary import Vocabulary

FORMAT, VERSION = "magneto_dist model", 1
CARD = "README.md"
FILES = ("config.json", "model.safetensors", "vocabulary.txt", CARD)
_SECTIONS: dict[str, tuple[type, tuple[str, ...] | None]] = {
    "model": (ModelConfig, None),
    "augment": (AugmentConfig, ("image_size", "eval_crop_fraction")),
    "tags": (TagsConfig, ("max_tags",)),
    "train": (
        TrainConfig,
        ("objective", "threshold", "precision", "param_dtype", "channels_last"),
    ),
    "data": (DataConfig, ("constant_image", "max_image_megapixels")),
}
"""Settings that a user of the model needs, as they are called in our configuration; None: all."""


class Magneto(nn.Module, PyTorchModelHubMixin, library_name="magneto-dist"):
    """A trained network together with all that its input and output mean.

    Of the mixin: `save_pretrained(folder)` and `push_to_hub("USER/NAME")`, which is the one thing
    here that uploads anything.

    Args:
        run: from `load_run` or `load_exported`; the network is shared with it.
    """

    _hub_mixin_config = {}  # noqa: RUF012 - else the mixin makes one of a copy of all weights

    def __init__(self, run: TrainedRun) -> None:
        super().__init__()
        self.run, self.network = run, run.model

    def forward(
        self,
        tag_ids: Int64[Tensor, "batch slot"],
        tag_mask: Bool[Tensor, "batch slot"],
        pixels: UInt8[Tensor, "batch 3 height width"] | None = None,
    ) -> Prediction:
        """What the network says, in the precision that it was trained in; see `MAGNeto.forward`."""
        with self.run.autocast(tag_ids.device):
            return self.network(tag_ids, tag_mask, pixels)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        **download: Any,
    ) -> Magneto:
        """Reads a model; nothing is unpickled.

        Args:
            pretrained_model_name_or_path: a run folder, a folder that `save_pretrained` or
                `export.py` wrote, or else what the Hub calls it ("USER/NAME").
            device: where it will compute.
            download: `revision`, `token`, `cache_dir`, `local_files_only` ... of
                `huggingface_hub.snapshot_download`.

        Raises:
            InputError: there is no such model, it cannot be downloaded, or it is damaged.
        """
        folder = Path(pretrained_model_name_or_path)
        if (folder / "config.yaml").is_file():
            return cls(load_run(folder, device))
        if not folder.is_dir():
            folder = _downloaded(str(pretrained_model_name_or_path), download)
        return cls(load_exported(folder, device))

    def _save_pretrained(self, save_directory: Path) -> None:
        config = json.dumps(_settings(self.run), indent=2, ensure_ascii=False) + "\n"
        (save_directory / "config.json").write_text(config, encoding="utf-8")
        state = self.network.state_dict()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, save_directory / "model.safetensors", metadata={"format": "pt"})
        (save_directory / "vocabulary.txt").write_bytes(self.run.vocabulary.to_bytes())

    def generate_model_card(self, *_: Any, **about: Any) -> ModelCard:
        """The card that came with the model, or one of its run; see `model_card` for `about`."""
        card = self.run.checkpoint / CARD
        text = card.read_text("utf-8") if card.is_file() else model_card(self.run, **about)
        return ModelCard(text, ignore_metadata_errors=True)


def load_exported(folder: Path, device: torch.device | str = "cpu") -> TrainedRun:
    """Reads what `Magneto.save_pretrained` wrote; the model gives the same bits as the run's did.

    Nothing is unpickled or downloaded. Settings that a trained model has no use for have their
    defaults in `config`.

    Raises:
        InputError: no exported model there, of another format or version, or damaged.
    """
    try:
        content = json.loads((folder / "config.json").read_bytes())
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise InputError(f"{folder}/config.json: is not of the format {FORMAT!r} {VERSION}")
        config = Config(**{name: kind(**content[name]) for name, (kind, _) in _SECTIONS.items()})
        decision = _decision(content, config)
        vocabulary = Vocabulary.from_bytes((folder / "vocabulary.txt").read_bytes())
    except OSError as error:
        raise InputError(f"{folder}: no run and no exported model there ({error})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder}/config.json: is damaged ({error}); export it again") from None
    if len(vocabulary) != content.get("num_tags"):
        raise InputError(
            f"{folder}/vocabulary.txt: has {len(vocabulary)} tags, config.json says"
            f" {content.get('num_tags')}; export it again"
        )
    model = load_model(folder, config, len(vocabulary), device)
    return TrainedRun(config, vocabulary, model, folder, decision)


def _settings(run: TrainedRun) -> dict[str, Any]:
    # All weights are in the folder; where they once came from is a path of this machine.
    model = replace(run.config.model, backbone_weights="none", tag_embedding_init=None)
    everything = asdict(replace(run.config, model=model))
    settings = {
        name: {key: everything[name][key] for key in keys or everything[name]}
        for name, (_, keys) in _SECTIONS.items()
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_tags": len(run.vocabulary),
        **settings,
        "decision": run.decision.as_json(),
    }


def _decision(content: dict[str, Any], config: Config) -> Decision:
    if "decision" not in content:  # written by a version that left it out
        return Decision(config.train.threshold)
    try:
        return Decision.from_json(content["decision"])
    except InputError as error:
        raise ValueError(error) from None  # damaged as others are


def _downloaded(hub_id: str, options: dict[str, Any]) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(FILES), **options))
    except (HfHubHTTPError, OSError, ValueError) as error:  # offline, unknown, private, no id
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{hub_id}: no such folder here, and the Hub does not give a model of that name"
            f" ({reason})"
        ) from None
