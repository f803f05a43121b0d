"""The paper's experiments on LS, its large data set: sections 4.1, 5.1 and 5.3, and the abstract.

A run's settings are what it changes in `configs/ls.yaml`. The paper prints figures 9 and 10
without numbers, and pre-trains nothing on LS that it tells of.
"""

from __future__ import annotations

from reproduce_grid import SMOKE, Claim, Experiment, Run, Study, more


def _run(name: str, title: str, settings: dict[str, object] | None = None) -> Run:
    return Run(name, title, settings or {}, launcher="train_ls.py", config="ls.yaml")


_AUX, _BCE, _NO_TAD = "magneto-aux", "magneto-aux-bce", "magneto-aux-no-tad"

_RUNS = (
    _run(_AUX, "MAGNeto aux"),
    _run(_BCE, "MAGNeto aux, BCE", {"loss.kind": "bce"}),
    _run(_NO_TAD, "MAGNeto aux, no TAD", {"tags.beta_add": 0, "tags.beta_drop": 0}),
)


def _beats(stream: str, metric: str) -> Claim:
    text = f"The gated output beats the {stream} stream's"
    return Claim(text, "section 5.3, Figure 9", (_AUX, "f1"), (_AUX, metric))


_GAPS = "Gaps on LS, says section 5.3, are usually “a few percent of F1”, larger than on NUS-WIDE."

_EXPERIMENTS = (
    Experiment(
        "data",
        "The large data set",
        "Section 4.1, section 5.1",
        shows="data",
        data={"items": 700_000, "tags in the vocabulary": 24_056, "mean number of tags": 43},
        note="The paper says “about” of its items and of their tags, and not how many of them it"
        " validates on.",
    ),
    Experiment(
        "abstract",
        "F1 on the large data set",
        "Abstract",
        (_AUX,),
        ("precision", "recall", "f1"),
        {_AUX: {"f1": 50}},
        note="The paper does not say of which of its models this is. Here it is the whole of"
        " section 3 with TAD, and without pre-training.",
    ),
    Experiment(
        "outliers",
        "Tag adding & dropping and outliers",
        "Section 5.1",
        (_NO_TAD, _AUX),
        ("outlier", "f1", "f1_with_outliers"),
        {_NO_TAD: {"outlier": (8, 10)}, _AUX: {"outlier": (0.5, 0.8)}},
        (
            more(_NO_TAD, _AUX, "outlier", "TAD lowers the outlier %", "section 5.1"),
            more(_AUX, _NO_TAD, "f1", "TAD raises F1 (of any data set)", "section 5.1"),
        ),
        bars="outlier",
        note="The paper does not say how many tags it added to an item; of F1 on LS with and"
        " without TAD it says nothing, only that TAD reduces overfitting.",
    ),
    Experiment(
        "figure9",
        "F1 of different output positions",
        "Figure 9, section 5.3",
        (_AUX,),
        ("f1", "image_f1", "tag_f1"),
        claims=(_beats("image", "image_f1"), _beats("tag", "tag_f1")),
        curves=("outputs",),
        note=_GAPS,
    ),
    Experiment(
        "figure10",
        "F1 of BCE and of BCE-Dice",
        "Figure 10, section 5.3",
        (_BCE, _AUX),
        ("f1", "f1_on_the_way"),
        claims=(
            more(_AUX, _BCE, "f1", "BCE-Dice raises F1", "section 5.3, Figure 10"),
            more(
                _AUX,
                _BCE,
                "f1_on_the_way",
                "BCE-Dice converges faster (of any data set)",
                "section 3.2",
            ),
        ),
        curves=("f1",),
        note=_GAPS,
    ),
)

_SMALL = {
    "model.backbone": "resnet18",
    "model.frozen_stages": 2,  # of 3: as in LS, the last one is trained
    "model.num_heads": 4,
    "model.image_layers": 1,
    "model.tag_layers": 2,
    "tags.max_tags": 16,  # demo items have 6 to 12
    "train.global_batch_size": 32,
}

LS = Study("large-scale data", _RUNS, _EXPERIMENTS, {**SMOKE, **_SMALL})
