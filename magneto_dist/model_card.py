"""The README.md that goes with a trained model, for people and the Hub."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from magneto_dist.config import Config
from magneto_dist.decision import Decision
from magneto_dist.report import final_table
from magneto_dist.trained_run import TrainedRun
from magneto_dist.training.checkpoint import has_progress, read_progress


def model_card(run: TrainedRun, *, parity: str = "") -> str:
    """What the model is, what it was trained on, how good it is, what it cannot do.

    Args:
        run: whose model it is.
        parity: lines on the files for other runtimes that lie beside it.
    """
    config = run.config
    pictures = (
        f"- `pixels`: uint8 `[batch, 3, {config.augment.image_size}, {config.augment.image_size}]`,"
        " RGB of 0 to 255, not normalised: upright, the square at the centre with"
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
        data=_name_of_data(config) if has_progress(run.checkpoint) else "not known",
        num_tags=len(run.vocabulary),
        num_parameters=sum(p.numel() for p in run.model.parameters()),
        decision=_decision(run.decision),
        max_tags=config.tags.max_tags,
        pictures=pictures,
        scores=_scores(run),
        parity=parity and f"\n{parity}\n",
    )


def _scores(run: TrainedRun) -> str:
    if not has_progress(run.checkpoint):
        return "Not known: the model came without its card."
    progress = read_progress(run.checkpoint)
    if not progress.evaluated:
        return f"These weights, of step {progress.step}, were not evaluated."
    return (
        f"After step {progress.step}, on the validation split of the data it was trained on, at the"
        f" threshold {run.config.train.threshold:g} of its training:\n\n"
        f"```\n{final_table(progress.validation)}\n```"
    )


def _decision(decision: Decision) -> str:
    if decision.temperature is None:
        return f"{decision.threshold:g} on"
    return (
        f"{decision.threshold:g} on, which `Predictor` says as {decision.calibrated_threshold:.4g}:"
        f" for its probabilities it divides log-odds by a temperature of {decision.temperature:.4g}"
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
- A tag counts as predicted from probability {decision}.

## How good it is

{scores}

## Limits

- It chooses among the tags that a picture comes with; it adds none.
- A tag that is not in `vocabulary.txt`, letter by letter, is not scored; nor are an item's tags
  beyond the first {max_tags}. Both are reported.
- What is important is what was labelled so in its training data. On pictures or tags from elsewhere
  nothing above was measured.

## How to use it

```python
from magneto_dist import Predictor

predictor = Predictor.from_pretrained("USER/NAME")  # or a folder
print(predictor.predict("picture.jpg", ["sea", "dog", "2019"]))
```

The network itself takes tensors:

- `tag_ids`: int64 `[batch, slot]`, lines of `vocabulary.txt`; {num_tags} in empty slots.
- `tag_mask`: bool `[batch, slot]`, true where the slot holds a tag.
{pictures}{parity}
## Licence

The code (magneto_dist) is under Apache-2.0. The licence of these weights is for whoever trained
them to state here; mind that of the pictures and tags they were trained on.
"""
