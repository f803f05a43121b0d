"""The average of weights: its arithmetic, and what becomes of it in real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from magneto_dist.trained_run import load_run
from magneto_dist.training.telemetry import flatten
from magneto_dist.training.weight_average import WeightAverage
from processes import TINY, summary
from warm import Warm, places

DECAY, STEPS = 0.5, 8


def step(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    model[0].bias.requires_grad_(False)
    return model


def raise_where_swapped(model: nn.Module, inside: dict, outside: dict) -> NoReturn:
    assert model[0].weight.equal(inside["0.weight"])
    assert not model[0].weight.equal(outside["0.weight"])
    raise KeyboardInterrupt


@pytest.mark.parametrize("num_updates", [0, 7])
def test_averages_equal_a_plain_loop(num_updates: int) -> None:
    model = make_model()
    average = WeightAverage(model, 0.8, num_updates)
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    expected = {name: w.detach().numpy().copy() for name, w in trained.items()}
    decays = []
    for n in range(num_updates + 1, num_updates + 60):
        step(model)
        average.update()
        decays.append(min(0.8, (1 + n) / (10 + n)))
        for name, weight in trained.items():
            expected[name] = (
                decays[-1] * expected[name] + (1 - decays[-1]) * weight.detach().numpy()
            )
    assert decays[0] < decays[-1] == 0.8
    assert average.averages.keys() == expected.keys() == trained.keys()
    assert "0.bias" not in expected
    for name, values in expected.items():
        torch.testing.assert_close(
            average.averages[name], torch.from_numpy(values), rtol=1e-12, atol=0
        )


def test_half_precision_weights_have_an_average_that_moves() -> None:
    model = nn.Linear(4, 4).bfloat16()
    average = WeightAverage(model, 0.9999, num_updates=10**6)
    before = average.averages["weight"].clone()
    with torch.no_grad():
        model.weight.mul_(1.5)
    average.update()
    assert average.averages["weight"].dtype == torch.float32
    moved = average.averages["weight"] - before
    torch.testing.assert_close(moved, 1e-4 * (model.weight.float() - before), rtol=1e-2, atol=1e-8)
    with average.swapped_in():
        assert model.weight.equal(average.averages["weight"].bfloat16())


def test_weights_come_back_bit_for_bit() -> None:
    model = make_model()
    average = WeightAverage(model, DECAY)
    step(model)
    average.update()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in average.averages.items()}
    with pytest.raises(KeyboardInterrupt), average.swapped_in():
        raise_where_swapped(model, averages, before)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.equal(averages[name]) for name, tensor in average.averages.items())


def test_none_is_kept_unless_asked_for() -> None:
    model = make_model()
    average = WeightAverage(model, 0.0)
    average.update()
    before = model[0].weight.clone()
    with average.swapped_in():
        assert model[0].weight.equal(before)
    assert average.averages == {}


def test_a_run_evaluates_keeps_and_hands_on_its_averages(
    warm: Warm, demo_shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = [
        *TINY,
        f"--train.ema_decay={DECAY}",
        "--optim.lr=0.3",
        "--checkpoint.every_steps=1",
        "--checkpoint.keep=1000",
        f"--max_steps={STEPS}",
        f"--data.path={demo_shards}",
    ]
    warm.run("train_ls.py", *options, f"--output_dir={run_dir}")
    folders = sorted((run_dir / "checkpoints").glob("step-*"))
    assert len(folders) == STEPS
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    averages = [load_file(folder / "ema.safetensors") for folder in folders]
    assert averages[0].keys() == weights[0].keys()
    for n in range(2, STEPS + 1):
        decay = min(DECAY, (1 + n) / (10 + n))
        for name, average in averages[n - 1].items():
            if not average.is_floating_point() or "running" in name:
                assert average.equal(weights[n - 1][name]), name
            else:
                expected = decay * averages[n - 2][name] + (1 - decay) * weights[n - 1][name]
                torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6, msg=name)
    assert not averages[-1]["tag_head.weight"].equal(weights[-1]["tag_head.weight"])
    # Those who use the run get what was evaluated.
    trained = load_run(run_dir)
    step_taken = int(trained.checkpoint.name.removeprefix("step-"))
    assert trained.model.state_dict()["tag_head.weight"].equal(
        averages[step_taken - 1]["tag_head.weight"]
    )
    scores = tmp_path / "scores.json"
    warm.run("evaluate.py", f"--run={run_dir}", f"--out={scores}")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    evaluated = {m["step"]: m for m in map(json.loads, lines) if m["split"] == "validation"}
    scored = json.loads(scores.read_bytes())["validation"]
    for name in ("loss", "final/paper/f1"):
        assert flatten(scored)[name] == pytest.approx(evaluated[step_taken][name], rel=1e-6)
    assert summary(run_dir)["best"]["step"] == step_taken
    # Fine-tuning starts from them.
    more = [f"--init_from={run_dir}", "--optim.lr=1e-30", f"--output_dir={tmp_path / 'next'}"]
    warm.run("train_ls.py", *options, *more, "--max_steps=1")
    first = load_file(tmp_path / "next/checkpoints/step-00000001/model.safetensors")
    assert first["tag_head.weight"].equal(averages[step_taken - 1]["tag_head.weight"])


def test_zero_3_is_refused_before_anything_is_written(
    warm: Warm, demo_shards: Path, tmp_path: Path
) -> None:
    deepspeed = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage",
    }
    options = [*TINY, f"--data.path={demo_shards}", f"--output_dir={tmp_path / 'run'}"]
    ranks = [
        warm.start("train_ls.py", *options, "--train.ema_decay=0.9", environment=deepspeed | place)
        for place in places(2)
    ]
    assert [warm.wait(rank) for rank in ranks] == [2, 2], ranks[0].output
    said = [rank.output.count("use ZeRO-2, or set it to 0") for rank in ranks]
    assert said == [1, 0]
    assert not (tmp_path / "run").exists()
