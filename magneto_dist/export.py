"""A trained run as a folder that can be handed on, to people, the Hugging Face Hub or ONNX Runtime.

    config.json         what the model is and how its input is prepared
    model.safetensors   plain weights under the names of the model's state_dict
    vocabulary.txt      one tag a line; line number from 0 = id
    README.md           model card
    model.onnx          if asked for: the whole model, from tag ids and pixels to probabilities

Plain files and no `PyTorchModelHubMixin`: that would load weights without the vocabulary, which
alone says what they mean. `huggingface_hub.upload_folder` and `snapshot_download` move the folder.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from magneto_dist.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    TagsConfig,
    TrainConfig,
)
from magneto_dist.errors import InputError
from magneto_dist.files import sync_file, sync_folder
from magneto_dist.model.backbone import Backbone
from magneto_dist.report import final_table
from magneto_dist.trained_run import TrainedRun, load_model
from magneto_dist.training.checkpoint import read_progress
from magneto_dist.vocabulary import Vocabulary

FORMAT, VERSION = "magneto_dist model", 1
ONNX_TOLERANCE = 1e-4
"""Largest difference of a probability between torch and ONNX Runtime."""
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_SECTIONS: dict[str, tuple[type, tuple[str, ...] | None]] = {
    "model": (ModelConfig, None),
    "augment": (AugmentConfig, ("image_size", "eval_crop_fraction")),
    "tags": (TagsConfig, ("max_tags",)),
    "train": (TrainConfig, ("objective", "threshold", "param_dtype", "channels_last")),
    "data": (DataConfig, ("constant_image",)),
}
"""Settings that whoever uses the model needs, as they are called in our configuration."""


def export_run(run: TrainedRun, out: Path, *, onnx: bool = False) -> float | None:
    """Writes the folder `out`, which is complete or absent.

    Args:
        run: from `load_run`.
        out: absent, or an empty folder.
        onnx: write `model.onnx` too, and compare it with torch.

    Returns:
        The largest difference of a probability between torch and ONNX Runtime; None without `onnx`.

    Raises:
        InputError: `out` is not empty or cannot be written, the packages of the extra `export` are
            missing, or ONNX Runtime says something else than torch.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {out}: is there and not empty; remove it or choose another")
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if onnx and missing:
        raise InputError(
            f"--onnx needs the package {missing[0]}: pip install 'magneto-dist[export]'"
        )
    out = out.resolve()
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(run, temporary, onnx)
        difference = _write_onnx(run, temporary / "model.onnx") if onnx else None
        for file in temporary.iterdir():
            sync_file(file)
        temporary.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def load_exported(folder: Path, device: torch.device | str = "cpu") -> TrainedRun:
    """Reads what `export_run` wrote; the model gives the same bits as the run's did.

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
        vocabulary = Vocabulary.from_bytes((folder / "vocabulary.txt").read_bytes())
    except OSError as error:
        raise InputError(f"{folder}: no exported model there ({error})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder}/config.json: is damaged ({error}); export it again") from None
    if len(vocabulary) != content.get("num_tags"):
        raise InputError(
            f"{folder}/vocabulary.txt: has {len(vocabulary)} tags, config.json says"
            f" {content.get('num_tags')}; export it again"
        )
    model = load_model(folder, config, len(vocabulary), device)
    return TrainedRun(config, vocabulary, model, folder)


def _write_files(run: TrainedRun, folder: Path, onnx: bool) -> None:
    config = json.dumps(_settings(run), indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    state = {name: t.detach().cpu().contiguous() for name, t in run.model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "vocabulary.txt").write_bytes(run.vocabulary.to_bytes())
    (folder / "README.md").write_text(model_card(run, onnx=onnx), encoding="utf-8")


def _settings(run: TrainedRun) -> dict[str, Any]:
    # All weights are in the folder; where they once came from is a path of this machine.
    model = replace(run.config.model, backbone_weights="none", tag_embedding_init=None)
    everything = asdict(replace(run.config, model=model))
    settings = {
        name: {key: everything[name][key] for key in keys or everything[name]}
        for name, (_, keys) in _SECTIONS.items()
    }
    return {"format": FORMAT, "version": VERSION, "num_tags": len(run.vocabulary), **settings}


class _Probabilities(nn.Module):
    """A model as a function from plain tensors to plain tensors, in float32 on the CPU.

    Frozen stages that the run computed in 16 bits included: ONNX Runtime has no such kernels.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = deepcopy(model).cpu().float().eval()
        for module in self.model.modules():
            if isinstance(module, Backbone):
                module.frozen_dtype = None

    def forward(
        self, tag_ids: Tensor, tag_mask: Tensor, pixels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """ "probability" of the final head, and of what it is mixed of "image", "tag", "alpha"."""
        prediction = self.model(tag_ids, tag_mask, pixels)
        names = {head: "probability" if head == "final" else head for head in prediction.heads}
        if "final" in names and prediction.alpha is None:
            names = {"final": "probability"}  # a baseline: its stream is its output
        outputs = {name: prediction.probability(head) for head, name in names.items()}
        return outputs if prediction.alpha is None else {**outputs, "alpha": prediction.alpha}


def _write_onnx(run: TrainedRun, path: Path) -> float:
    """Writes `path` and compares it with torch at several batch sizes; the largest difference."""
    model, inputs = _Probabilities(run.model), _random_inputs(run, batch_size=2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own insides
        program = torch.onnx.export(
            model,
            kwargs=inputs,
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=list(model(**inputs)),
            dynamic_shapes={name: {0: torch.export.Dim("batch")} for name in inputs},
        )
        assert program is not None
        program.save(path, external_data=False)  # above 2 GB it takes a second file all the same
    difference = max(_difference(model, path, _random_inputs(run, size)) for size in (1, 2, 5))
    if not difference <= ONNX_TOLERANCE:
        raise InputError(
            f"--onnx: ONNX Runtime's probabilities differ by {difference:.2g} from torch's, more"
            f" than {ONNX_TOLERANCE:g}; nothing was written, leave --onnx out"
        )
    return difference


def _random_inputs(run: TrainedRun, batch_size: int) -> dict[str, Tensor]:
    """Tag lists of any length, one of them empty, and noise as pictures."""
    generator = torch.Generator().manual_seed(batch_size)
    slots, num_tags = run.config.tags.max_tags, len(run.vocabulary)
    lengths = torch.randint(1, slots + 1, (batch_size, 1), generator=generator)
    lengths[1:2] = 0
    mask = torch.arange(slots) < lengths
    ids = torch.randint(num_tags, (batch_size, slots), generator=generator)
    inputs = {"tag_ids": ids.where(mask, num_tags), "tag_mask": mask}
    if run.config.model.sees_pictures:
        shape = (batch_size, 3, run.config.augment.image_size, run.config.augment.image_size)
        inputs["pixels"] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return inputs


def _difference(model: nn.Module, path: Path, inputs: dict[str, Tensor]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]  # one that the model ignores is left out
    with torch.no_grad():
        expected = model(**inputs)
    got = session.run(list(expected), {name: inputs[name].numpy() for name in names})
    pairs = zip(got, expected.values(), strict=True)
    return max(float((torch.as_tensor(ours) - theirs).abs().max()) for ours, theirs in pairs)


def model_card(run: TrainedRun, *, onnx: bool) -> str:
    """The README.md of an exported run, for people and the Hub."""
    config = run.config
    progress = read_progress(run.checkpoint)
    scores = (
        f"After step {progress.step}, on the validation split of the data it was trained on:\n\n"
        f"```\n{final_table(progress.validation)}\n```"
        if progress.evaluated
        else f"These weights, of step {progress.step}, were not evaluated."
    )
    pictures = (
        f"- `pixels`: uint8 `[batch, 3, {config.augment.image_size}, {config.augment.image_size}]`,"
        " RGB of 0 to 255, not normalised: the square at the centre with"
        f" {config.augment.eval_crop_fraction:g} of the shorter side, resized.\n"
        if config.model.sees_pictures
        else ""
    )
    return _CARD.format(
        kind=config.model.kind,
        what=(
            "Tells which of a picture's tags are the important ones."
            if config.train.objective == "important"
            else "Pre-trained to tell a picture's own tags from foreign ones; to be fine-tuned."
        ),
        data=_name_of_data(config),
        num_tags=len(run.vocabulary),
        num_parameters=sum(p.numel() for p in run.model.parameters()),
        threshold=config.train.threshold,
        max_tags=config.tags.max_tags,
        pictures=pictures,
        scores=scores,
        onnx=_ONNX_CARD if onnx else "",
    )


def _name_of_data(config: Config) -> str:
    """Its last part alone: the rest is of no use elsewhere, and a URL may hold a secret."""
    if config.data.path is None:
        return "generated demo data"
    name = Path(urlsplit(config.data.path).path).name
    return "`" + "".join(c for c in name if c.isprintable() and c != "`") + "`"


_CARD = """---
library_name: magneto-dist
license: other
tags:
- image-tagging
---

# MAGNeto ({kind})

{what}

- Trained on: {data}
- Tags it knows: {num_tags:,} (`vocabulary.txt`, line number from 0 = id)
- Parameters: {num_parameters:,}
- A tag counts as predicted from probability {threshold:g} on.

## How good it is

{scores}

## How to use it

```python
from pathlib import Path
from magneto_dist.export import load_exported

run = load_exported(Path("FOLDER"))  # e.g. huggingface_hub.snapshot_download("USER/NAME")
prediction = run.model(tag_ids, tag_mask, pixels)
probability = prediction.probability(prediction.heads[0])  # [batch, slot]
```

- `tag_ids`: int64 `[batch, {max_tags}]`, lines of `vocabulary.txt`; {num_tags} in empty slots.
- `tag_mask`: bool `[batch, {max_tags}]`, true where the slot holds a tag.
{pictures}{onnx}
## Licence

The code (magneto_dist) is under Apache-2.0. The licence of these weights is for whoever trained
them to state here; mind that of the pictures and tags they were trained on.
"""
_ONNX_CARD = """
`model.onnx` takes the same inputs by these names, any number of items at once, and gives
`probability`, and where the model has them `image`, `tag` (both streams) and `alpha` (weight of the
picture), all float32 `[batch, slot]`.
"""
