"""What all ranks must agree on before the first step, and the disk space that a run needs.

Ranks that differ would wait for each other for ever, or train on different data without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from magneto_dist.config import Config
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError
from magneto_dist.files import require_space
from magneto_dist.training.checkpoint import Progress
from magneto_dist.training.ranks import name_ranks
from magneto_dist.training.resume import fingerprint
from magneto_dist.training.session import Session

_NODE_HAS_ITS_OWN = {
    "data.path",  # what lies there is compared
    "data.cache_dir",
    "data.cache_gb",
    "data.feature_cache_gb",
    "data.decoder",  # what it has become is compared
    "data.num_workers",
    "data.prefetch_batches",
    "data.dali_queue_depth",
    "data.loader_timeout_s",
    "data.read_ahead_steps",
}
"""Settings that may differ from node to node: paths, and what the loader takes of a machine."""
_SAME_COMMAND = "start all ranks with the same command line and configuration file"
_SAME_DATA = "let --data.path lead to the same data set on every node"


class Fact(NamedTuple):
    """Something that is the same on all ranks, or the run does not begin."""

    value: str
    remedy: str
    """What to do where it is not."""
    context: str = ""
    """Shown with the value, and not compared."""


Facts = Mapping[str, Fact]


def check_agreement(
    session: Session, config: Config, loader: Loader, plan: BatchPlan, start: Progress
) -> None:
    """Compares what the ranks are about to do, and looks for room in the caches of their nodes.

    Raises:
        InputError: they differ, or a cache will not fit onto its disk; on all ranks the same.
    """
    facts = session.gather(_facts(session.strategy, config, loader, plan, start))
    session.on_all(lambda: require_agreement(facts))
    is_first_of_node = session.world.rank_of_node == 0  # its ranks share the cache
    session.on_all(lambda: _require_cache_space(loader.dataset) if is_first_of_node else None)


def require_agreement(facts: Sequence[Facts]) -> None:
    """Compares the facts of all ranks, which name the same things unless their code differs.

    Raises:
        InputError: two ranks differ; names the first thing in which they do, and all its values.
    """
    different = [name for name in facts[0] if len({_fact(each, name).value for each in facts}) > 1]
    if not different:
        return
    name = different[0]
    ranks_of: dict[str, list[int]] = {}
    for rank, each in enumerate(facts):
        ranks_of.setdefault(_fact(each, name).value, []).append(rank)
    values = "; ".join(
        f"{value}{_fact(facts[ranks[0]], name).context} on {name_ranks(ranks)}"
        for value, ranks in ranks_of.items()
    )
    others = f" ({len(different)} things differ)" if len(different) > 1 else ""
    raise InputError(f"the ranks differ in {name}: {values}{others}: {facts[0][name].remedy}")


def _fact(facts: Facts, name: str) -> Fact:
    return facts.get(name, Fact("unknown", remedy=""))


def _facts(
    strategy: str, config: Config, loader: Loader, plan: BatchPlan, start: Progress
) -> Facts:
    """The cause comes before what follows from it: the first difference is the one that is told."""
    dataset = loader.dataset
    return {
        "the source code of magneto_dist": Fact(_code(), "install the same on every node"),
        "the version of torch": Fact(torch.__version__, "install the same on every node"),
        "the strategy": Fact(strategy, "give accelerate the same configuration on every node"),
        **{f"--{key}": Fact(str(value), _SAME_COMMAND) for key, value in _settings(config)},
        "the vocabulary": Fact(dataset.vocabulary.sha256[:12], _SAME_DATA, f" in {dataset.root}"),
        "the training data": _data(fingerprint(dataset), dataset, "train"),
        "the validation data": _data(_hash(dataset.splits["validation"]), dataset, "validation"),
        "the decoder": Fact(loader.decoder, "set --data.decoder, or install DALI on every node"),
        "the checkpoint to go on from": Fact(
            f"step {start.step}, {_hash(start)[:12]}",
            "let --output_dir (or --resume) lead to the same folder on every node",
        ),
        "the cut of a global batch": Fact(
            f"{plan.num_ranks} ranks x {plan.micro_steps} x {plan.micro_batch_size}", _SAME_COMMAND
        ),
    }


def _settings(config: Config) -> list[tuple[str, object]]:
    flat: dict[str, object] = {}
    for key, value in asdict(config).items():
        is_section = isinstance(value, dict)
        flat |= {f"{key}.{k}": v for k, v in value.items()} if is_section else {key: value}
    return [(key, value) for key, value in flat.items() if key not in _NODE_HAS_ITS_OWN]


def _data(identity: str, dataset: Dataset, split: str) -> Fact:
    context = f" ({dataset.num_samples(split):,} items in {dataset.root})"
    return Fact(identity[:12], _SAME_DATA, context)


def _hash(thing: object) -> str:
    return hashlib.sha256(repr(thing).encode()).hexdigest()


def _code() -> str:
    """Of the files themselves: an older copy may well have the same version number."""
    package = Path(__file__).parent.parent
    sha = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        sha.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:12]


def _require_cache_space(dataset: Dataset) -> None:
    shards = (shard for split in dataset.splits.values() for shard in split)
    dataset.tar_storage.require_cache_space({shard.file: shard.num_bytes for shard in shards})


def require_checkpoint_space(config: Config, model: nn.Module) -> None:
    """Looks before the first step whether a checkpoint fits beside those that are there.

    Raises:
        InputError: it does not.
    """
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    if config.train.ema_decay:
        num_bytes *= 2
    if config.optim.momentum:
        num_bytes += sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    require_space(Path(config.output_dir), num_bytes, "a checkpoint (weights and momentum)")
