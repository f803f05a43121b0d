"""A trained run as a folder that can be handed on, for the Hub and for other runtimes.

1. `Magneto.save_pretrained` writes weights, settings, vocabulary and card (`hub.py`).
2. If asked for, the whole network, from tag ids and pixels to probabilities, for any number of
   items and tags: `model.pt2` (torch.export) and, of the same graph, `model.onnx`.
3. Both are run on real pictures and compared with the network itself; one that differs is refused.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from magneto_dist.data.items import Items
from magneto_dist.decision import Decision
from magneto_dist.errors import InputError
from magneto_dist.files import sync_file, sync_folder
from magneto_dist.hub import Magneto
from magneto_dist.inference import ScoringBatches
from magneto_dist.model.backbone import Backbone
from magneto_dist.trained_run import TrainedRun

Runtime = Literal["pt2", "onnx"]
Inputs = dict[str, Tensor]
"""`tag_ids`, `tag_mask` and, where the model looks at pictures, `pixels`."""
TOLERANCE = 1e-4
"""Largest difference of a probability between the network and its exported form."""
CHECKED_ITEMS = 64
METADATA = "decision"
"""Where a file for another runtime says which threshold and temperature its output is for."""
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_BATCH_SIZES = (1, 2, 5, 8)  # the rest by eights


@dataclass(frozen=True)
class Parity:
    """How far an exported form is from the network."""

    difference: float
    """Largest of any probability of any tag."""
    pictures: int
    """Items compared."""


def export_run(
    run: TrainedRun, out: Path, runtimes: Sequence[Runtime] = (), items: Items | None = None
) -> dict[Runtime, Parity]:
    """Writes the folder `out`, which is complete or absent.

    Args:
        run: from `load_run`.
        out: absent, or an empty folder.
        runtimes: write `model.pt2`, `model.onnx`.
        items: to compare these on, the first CHECKED_ITEMS of them; None: write neither.

    Returns:
        How far each of `runtimes` is from the network.

    Raises:
        InputError: `out` is not empty or cannot be written, the packages of the extra `export` are
            missing, no item can be used, or a runtime differs by more than TOLERANCE.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out {out}: is there and not empty; remove it or choose another")
    if "onnx" in runtimes:
        _require_packages()
    out = out.resolve()
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        parity = {} if items is None else _write_runtimes(run, temporary, runtimes, items)
        Magneto(run).save_pretrained(temporary, model_card_kwargs={"parity": _told(parity)})
        for file in temporary.iterdir():
            sync_file(file)
        temporary.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return parity


class Probabilities(nn.Module):
    """A network as a function from plain tensors to plain tensors, in float32 on the CPU.

    Frozen stages that the run computed in 16 bits included: ONNX Runtime has no such kernels.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        plain = deepcopy(network).cpu().float().eval()
        self.network = plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for module in self.network.modules():
            if isinstance(module, Backbone):
                module.frozen_dtype = None

    def forward(
        self, tag_ids: Tensor, tag_mask: Tensor, pixels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """ "probability" of the final head, and of what it is mixed of "image", "tag", "alpha"."""
        prediction = self.network(tag_ids, tag_mask, pixels)
        names = {head: "probability" if head == "final" else head for head in prediction.heads}
        if "final" in names and prediction.alpha is None:
            names = {"final": "probability"}  # a baseline: its stream is its output
        outputs = {name: prediction.probability(head) for head, name in names.items()}
        return outputs if prediction.alpha is None else {**outputs, "alpha": prediction.alpha}


Call = Callable[[Inputs], Mapping[str, Any]]
"""An exported form at work: inputs -> arrays [batch, slot] by their names."""


def export_graph(network: Probabilities, run: TrainedRun) -> torch.export.ExportedProgram:
    """The network's graph, for any number of items and of tags."""
    size = run.config.augment.image_size
    mask = torch.ones(3, 5, dtype=torch.bool)
    inputs: Inputs = {"tag_ids": torch.zeros(3, 5, dtype=torch.int64), "tag_mask": mask}
    if run.config.model.sees_pictures:
        inputs["pixels"] = torch.zeros(3, 3, size, size, dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own insides
        return torch.export.export(network, (), inputs, dynamic_shapes=_axes(inputs))


def _axes(inputs: Iterable[str]) -> dict[str, dict[int, torch.export.Dim]]:
    """Those that may have any length, by their names."""
    batch, slot = torch.export.Dim("batch"), torch.export.Dim("slot")
    return {name: {0: batch} if name == "pixels" else {0: batch, 1: slot} for name in inputs}


def write_pt2(graph: torch.export.ExportedProgram, path: Path, decision: Decision) -> Call:
    """Writes `path`, with the decision as JSON in its extra file METADATA, and reads it back."""
    torch.export.save(graph, path, extra_files={METADATA: json.dumps(decision.as_json())})
    module = torch.export.load(path).module()
    return lambda inputs: module(**inputs)


def write_onnx(graph: torch.export.ExportedProgram, path: Path, decision: Decision) -> Call:
    """Writes `path`, with the decision as JSON in its METADATA, and opens it in ONNX Runtime."""
    outputs, example = graph.call_spec.out_spec, graph.example_inputs
    assert outputs is not None
    assert example is not None
    names = list(outputs.context)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells what it does not optimise
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            dynamo=True,
            verbose=False,
            output_names=names,
            dynamic_shapes=_axes(example[1]),  # for their names alone
        )
    assert program is not None
    program.model.metadata_props[METADATA] = json.dumps(decision.as_json())
    program.save(path, external_data=False)  # above 2 GB it takes a second file all the same
    return open_onnx(path)


def open_onnx(path: Path, num_threads: int = 0) -> Call:
    """A model in ONNX Runtime, on the CPU; 0 threads: as many as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    taken = [node.name for node in session.get_inputs()]  # what the model ignores is left out

    def call(inputs: Inputs) -> dict[str, Any]:
        arrays = session.run(names, {name: inputs[name].numpy() for name in taken})
        return dict(zip(names, arrays, strict=True))

    return call


def inputs_of(run: TrainedRun, items: Items) -> Inputs:
    """The first CHECKED_ITEMS, less those that cannot be used, with all slots.

    Raises:
        InputError: there is none that can be used.
    """
    size = min(len(items), CHECKED_ITEMS)
    if size == 0:
        raise InputError("no items to compare the exported model on; name others with --check")
    batches = ScoringBatches(items, run.vocabulary, run.config, keep_pictures=False)
    batch = batches[range(size)]
    usable = [row for row, item in enumerate(batch.items) if item.error is None]
    if not usable:
        raise InputError(
            f"none of {size} items can be used to compare the exported model on, the first because"
            f" {batch.items[0].error}; name others with --check"
        )
    tensors = {"tag_ids": batch.tag_ids, "tag_mask": batch.tag_mask, "pixels": batch.pixels}
    return {name: tensor[usable] for name, tensor in tensors.items() if tensor is not None}


def batches_of(inputs: Inputs) -> list[Inputs]:
    """The same items in batches of several sizes, all but the first with no more slots than needed.

    What was traced with one number of items and slots must hold for any.
    """
    items = len(inputs["tag_ids"])
    sizes = [*_BATCH_SIZES, *[_BATCH_SIZES[-1]] * (items // _BATCH_SIZES[-1])]
    ends = [min(end, items) for end in accumulate(sizes)]
    cuts = [slice(a, b) for a, b in pairwise([0, *ends]) if a < b]
    batches = [{name: tensor[cut] for name, tensor in inputs.items()} for cut in cuts]
    return [batches[0], *map(_trimmed, batches[1:])]


def _trimmed(inputs: Inputs) -> Inputs:
    longest = int(inputs["tag_mask"].sum(1).max())
    lists = {name: inputs[name][:, :longest] for name in ("tag_ids", "tag_mask")}
    return {**inputs, **lists}


@torch.no_grad()
def largest_difference(network: nn.Module, call: Call, batches: list[Inputs]) -> float:
    """Between what they say of any tag; NaN if one of them says that."""
    differences = [
        (torch.as_tensor(theirs[name]) - ours)[inputs["tag_mask"]].abs().max()
        for inputs in batches
        for theirs in (call(inputs),)
        for name, ours in network(**inputs).items()
    ]
    return float(torch.stack(differences).max())


def _write_runtimes(
    run: TrainedRun, folder: Path, runtimes: Sequence[Runtime], items: Items
) -> dict[Runtime, Parity]:
    batches = batches_of(inputs_of(run, items))
    network = Probabilities(run.model)
    graph = export_graph(network, run)
    parity: dict[Runtime, Parity] = {}
    for runtime in runtimes:
        call = _WRITERS[runtime](graph, folder / f"model.{runtime}", run.decision)
        difference = largest_difference(network, call, batches)
        if not difference <= TOLERANCE:  # NaN is no better
            raise InputError(
                f"--{runtime}: probabilities differ by {difference:.2g} from the model's, more than"
                f" {TOLERANCE:g}; nothing was written, leave --{runtime} out"
            )
        parity[runtime] = Parity(difference, sum(len(inputs["tag_ids"]) for inputs in batches))
    return parity


_WRITERS: dict[Runtime, Callable[[torch.export.ExportedProgram, Path, Decision], Call]] = {
    "pt2": write_pt2,
    "onnx": write_onnx,
}


def _require_packages() -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--onnx needs the package {missing[0]}: pip install 'magneto-dist[export]'"
        )


def _told(parity: Mapping[Runtime, Parity]) -> str:
    """For the model card."""
    if not parity:
        return ""
    lines = [
        f"- `model.{runtime}`: off by at most {found.difference:.1g} on {found.pictures} items."
        for runtime, found in parity.items()
    ]
    return "\n".join([_RUNTIMES, "", *lines])


_RUNTIMES = """The files for other runtimes take the same by these names, any number of items and
slots, and give `probability`, and where the model has them `image`, `tag` (both streams) and
`alpha` (weight of the picture), all float32 `[batch, slot]`, computed in float32. Each holds JSON
called `decision` (in ONNX metadata; in a `.pt2` file an extra file) with the `threshold` from which
on a tag of that `probability` is predicted. Where it has a `temperature` T, `Predictor` says
sigmoid(logit(`probability`) / T), and `calibrated_threshold` is the threshold for that. A `.pt2`
file is torch's (`torch.export.load(...).module()`); load those of people you trust."""
