"""The card says what the numbers say, and the numbers come from real runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import compare
import throughput
from compare import compare_results, require_same_hardware, verdict
from flops import flops_per_image, published_peak
from magneto_dist.config_io import load_config
from magneto_dist.errors import InputError
from processes import REPOSITORY
from scaling import World, limit_of, series, worlds_of
from step_memory import noise
from throughput_card import card, summary
from throughput_rules import Measured, ceiling, diagnose

SETTING = {
    "device": "cpu", "ranks": 1, "ranks_per_node": 1, "threads_per_rank": 1,
    "loader_processes_per_rank": 1, "decoder": "cpu", "arithmetic": "float32",
    "global_batch_size": 256, "image_size": 224, "policy": "imagenet",
    "backbone_is_frozen": False, "trims_padding": False, "compiles": False, "comm_hook": "none",
    "frozen_precision": "no", "frozen_precision_auto": "no",
    "slots_used": 0.6, "cores_got": 1.0, "peak_memory_gb": {"process": 1.0},
    "flop_per_image": 1e9, "published_flop_per_s": None, "matrix_product_flop_per_s": 1e12,
}  # fmt: skip


def measured(
    rates: dict[str, float], cores: int, data_wait: float, core_ms: dict[str, float], **more: Any
) -> Measured:
    stages = {
        name: {"images_per_s": rate, "core_ms_per_image": core_ms.get(name, 1e3 / rate)}
        for name, rate in rates.items()
    }
    timings = [
        {"name": n, "per_s": r, "slowest_per_s": 0.9 * r, "fastest_per_s": 1.1 * r}
        for n, r in rates.items()
    ]
    found = {**SETTING, "stages": stages, "timings": timings, "data_wait": data_wait, **more}
    return Measured(found, cores)


def on_gpu(data_wait: float = 0.0, **changed: Any) -> Measured:
    """One GPU of 2,000 images/s, 16 cores."""
    rates = {
        "whole": 1900.0, "loader": 6000.0, "step": 2000.0, "read": 20_000.0, "decode": 600.0,
        "augment": 900.0, "copy": 50_000.0, "forward+backward": 2200.0, "optimizer": 40_000.0,
    }  # fmt: skip
    rates |= {name: changed.pop(name) for name in list(changed) if name in (*rates, "all-reduce")}
    setting = {"device": "cuda", "loader_processes_per_rank": 8, "arithmetic": "fp16"}
    return measured(rates, 16, data_wait, {"copy": 0, "forward+backward": 0.1}, **setting | changed)


# The card ---------------------------------------------------------------------------------------


def test_on_a_cpu_the_ceiling_is_shared_by_all_stages():
    rates = {"whole": 90.0, "loader": 200.0, "step": 100.0, "read": 10_000.0, "decode": 500.0,
             "augment": 1000.0, "forward+backward": 110.0, "optimizer": 1500.0}  # fmt: skip
    found = measured(rates, 2, 0.0, {})
    core_s = 1 / 10_000 + 1 / 500 + 1 / 1000 + 1 / 110 + 1 / 1500
    assert ceiling(found)[0] == pytest.approx(2 / core_s)


def test_with_a_gpu_the_ceiling_is_the_slowest():
    assert ceiling(on_gpu())[0] == 2000
    assert ceiling(on_gpu(loader=1500.0))[0] == 1500


def test_slow_decoding_is_named_and_the_loader_processes_are_counted():
    found = on_gpu(data_wait=0.4, whole=1200.0, loader=1300.0, loader_processes_per_rank=2)
    bottleneck, because, settings = diagnose(found)
    assert bottleneck == "decode"
    assert "40%" in because
    # 2,000 images/s x (1/20,000 + 1/600 + 1/900) s = 5.7 processes
    assert settings[0].startswith("--data.num_workers 6 (now 2")
    assert any("dali_gpu" in setting for setting in settings)
    assert any("--shrink.shorter_side 256" in setting for setting in settings)


def test_no_more_loader_processes_than_cores_are_advised():
    found = on_gpu(data_wait=0.4, decode=50.0, loader_processes_per_rank=16)
    assert not any("num_workers" in setting for setting in diagnose(found).settings)


def test_slow_storage_is_told_from_slow_parsing():
    waits = on_gpu(data_wait=0.5, read=100.0)
    waits.found["stages"]["read"]["core_ms_per_image"] = 4.0
    waits.found["stages"]["decode"]["core_ms_per_image"] = 1.0
    assert diagnose(waits).bottleneck == "read"
    assert any("storage" in setting for setting in diagnose(waits).settings)
    waits.found["stages"]["read"]["core_ms_per_image"] = 9.9
    assert not any("storage" in setting for setting in diagnose(waits).settings)


def test_a_slow_model_is_named_with_the_settings_that_fit_it():
    bottleneck, _, settings = diagnose(on_gpu(arithmetic="float32", slots_used=0.2))
    assert bottleneck == "forward+backward"
    text = " ".join(settings)
    assert "--train.precision" in text
    assert "--tags.trim_padding true (20%" in text
    assert "feature_views" not in text
    assert "frozen_precision" not in text
    some = " ".join(diagnose(on_gpu(frozen_precision_auto="bf16")).settings)
    assert "--model.frozen_precision auto (bf16" in some
    frozen = " ".join(diagnose(on_gpu(backbone_is_frozen=True)).settings)
    assert "--data.feature_views" in frozen
    assert "--train.precision" not in frozen  # it is fp16 already


def test_gradients_count_for_what_they_add_to_a_step():
    hidden = {"all-reduce": 1800.0, "forward+backward": 2100.0}
    assert diagnose(on_gpu(**hidden)).bottleneck == "forward+backward"
    slow = {"all-reduce": 800.0, "step": 700.0, "whole": 690.0}
    bottleneck, _, settings = diagnose(on_gpu(**slow, ranks=2, ranks_per_node=2))
    assert bottleneck == "all-reduce"
    assert settings[0].startswith("--train.ddp_comm_hook bf16")


def test_the_loop_is_named_where_a_step_has_more_than_its_stages():
    bottleneck, _, settings = diagnose(on_gpu(step=800.0, whole=790.0))
    assert bottleneck == "loop"
    assert "--log.every_steps" in " ".join(settings)


def test_decoding_on_the_same_gpu_is_named():
    found = on_gpu(whole=1400.0, decoder="dali_gpu")
    assert diagnose(found).bottleneck == "decode"
    assert diagnose(on_gpu(whole=1400.0)).bottleneck == "forward+backward"


def test_cores_without_work_are_told_of():
    rates = {"whole": 95.0, "loader": 1000.0, "step": 100.0, "read": 10_000.0, "decode": 3000.0,
             "augment": 3000.0, "forward+backward": 105.0, "optimizer": 3000.0}  # fmt: skip
    idle = diagnose(measured(rates, 8, 0.0, {}))
    assert idle.bottleneck == "forward+backward"
    assert idle.settings[0].startswith("torchrun --nproc_per_node 8")
    busy = diagnose(measured(rates, 1, 0.0, {}))
    assert not any("torchrun" in setting for setting in busy.settings)


def test_the_card_warns_of_a_machine_that_is_not_quiet():
    quiet, busy = on_gpu(), on_gpu(cores_got=0.5)
    assert "warning" not in card(quiet, summary(quiet), "title")
    assert "a core for 50% of the time" in card(busy, summary(busy), "title")


def test_utilisation_is_of_the_data_sheet_where_it_is_known():
    found = on_gpu(published_flop_per_s=53.8e12, flop_per_image=10e9)
    assert summary(found)["model_flop_utilisation"] == pytest.approx(1900 * 10e9 / 53.8e12)
    assert summary(on_gpu())["model_flop_utilisation"] is None
    assert published_peak("NVIDIA GeForce RTX 2080 Ti", "fp16") == 53.8e12
    assert published_peak("NVIDIA GeForce RTX 2080 Ti", "bf16") is None
    assert published_peak("a CPU", "float32") is None


def test_flops_are_those_of_matrices_and_convolutions():
    config = load_config(REPOSITORY / "configs" / "demo.yaml")
    batch = noise(config, 50)[0][0]
    found = flops_per_image(batch, config, 50)
    # Filters x places x weights of a filter: stem, four convolutions of layer1, of layer2 three at
    # 3 x 3 from 128 channels, one from 64 and the shortcut; forward and two gradients (stem: one).
    stem = 64 * 24**2 * 147
    layers = 4 * 64 * 12**2 * 576 + 128 * 6**2 * (576 + 3 * 1152 + 64)
    convolutions = 2 * (2 * stem + 3 * layers)
    assert convolutions < found < 1.25 * convolutions  # the rest: two small Transformers


# Scaling ----------------------------------------------------------------------------------------


def test_one_process_is_measured_once():
    weak_and_strong = [World("weak", 1, 64), World("weak", 2, 128), World("strong", 2, 64)]
    assert worlds_of([1, 2], 64) == weak_and_strong


def test_efficiency_and_its_limit():
    alone = {"whole": 100.0, "step": 100.0, "forward+backward": 110.0, "optimizer": 2000.0}
    alone["data_wait"] = 0.0
    doubled = {name: 2 * rate for name, rate in alone.items()}
    points = series({World("weak", 1, 64): alone, World("weak", 2, 128): doubled})
    assert [point.efficiency for point in points] == [1.0, 1.0]
    assert "nothing" in points[1].limit
    shared = {**doubled, "whole": 120.0, "step": 120.0, "forward+backward": 130.0}
    assert limit_of(alone, shared, 2).startswith("forward+backward")
    travel = {**doubled, "whole": 120.0, "step": 120.0}
    assert limit_of(alone, travel, 2).startswith("gradients")
    hungry = {**doubled, "whole": 120.0, "data_wait": 0.4}
    assert limit_of(alone, hungry, 2).startswith("waiting for data")


# Comparing --------------------------------------------------------------------------------------


def result(rounds: list[float], **more: Any) -> dict[str, Any]:
    timing = {
        "name": "whole", "per_s": sorted(rounds)[len(rounds) // 2], "slowest_per_s": min(rounds),
        "fastest_per_s": max(rounds), "rounds_per_s": rounds,
    }  # fmt: skip
    return {"cpu": "one", "cores": 2, "gpu": None, "timings": [timing], **more}


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([100.0, 101.0, 102.0, 103.0, 104.0], "same"),
        ([104.5, 106.0, 107.0, 108.0, 109.0], "faster"),
        ([103.5, 106.0, 107.0, 108.0, 109.0], "same"),  # one round within the other's
        ([91.0, 92.0, 93.0, 94.0, 99.0], "slower"),
        ([80.0, 81.0, 82.0], "too few rounds"),
    ],
)
def test_results_differ_where_no_round_of_one_lies_among_the_others(after, said):
    before = result([100.0, 101.0, 102.0, 103.0, 104.0])
    (difference,) = compare_results(before, result(after), least=0.02)
    assert difference.verdict == said


def test_a_difference_too_small_to_matter_is_none():
    before, after = result([100.0, 100.1, 100.2, 100.3, 100.4]), result([101.0] * 5)
    assert compare_results(before, after, least=0.02)[0].verdict == "same"
    assert compare_results(before, after, least=0.001)[0].verdict == "faster"


def test_machines_are_not_compared_unless_asked(tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="cores 2 and 4"):
        require_same_hardware(result([1.0]), result([1.0], cores=4))
    paths = [tmp_path / f"{name}.json" for name in "abc"]
    slow = result([50.0] * 5, cores=4)
    for path, content in zip(paths, (result([100.0] * 5), slow, result([100.0] * 5)), strict=True):
        path.write_text(json.dumps(content))

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            compare.main()
        return int(ended.value.code or 0)

    assert run(paths[0], paths[2]) == 0
    assert "no difference beyond the spread" in capsys.readouterr().out
    with pytest.raises(InputError, match="--other_hardware"):
        run(paths[0], paths[1])
    assert run(paths[0], paths[1], "--other_hardware") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "slower: whole (0.50)"
    with pytest.raises(InputError, match="no result can be read"):
        run(paths[0], tmp_path / "nothing.json")
    assert verdict([]).startswith("no difference")


# All of it --------------------------------------------------------------------------------------

TINY = ["--rounds", "1", "--round_s", "0.05", "--data", "synthetic", "--items", "6",
        "--num_tags", "40", "--train.global_batch_size=8", "--model.batch_norm_group_size=4",
        "--data.num_workers=0"]  # fmt: skip


def test_large_pictures_make_decoding_the_bottleneck(tmp_path, monkeypatch, capsys):
    out = tmp_path / "größer" / "card"
    words = [*TINY, "--picture", "1600x1200", "--model.backbone_stages=1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *words])
    throughput.main()
    printed = capsys.readouterr().out
    said = json.loads(printed.splitlines()[-1])
    assert said["card"]["bottleneck"] == "decode"
    assert "bottleneck       decode" in printed
    assert str(tmp_path) not in said["command"]
    assert {"whole", "loader", "step", "read", "decode", "augment", "forward+backward",
            "optimizer"} == set(said["stages"])  # fmt: skip
    assert 0 < said["card"]["of_ceiling"] < 1.5
    assert json.loads(out.with_suffix(".json").read_text())["card"] == said["card"]
    assert "**Bottleneck: decode**" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 5000


def test_unknown_stages_are_an_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *TINY, "--only", "lunch"])
    with pytest.raises(InputError, match="--only lunch: there are whole, loader"):
        throughput.main()


@pytest.mark.slow
def test_a_scaling_series_starts_its_ranks():
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "throughput.py"), *TINY]
    done = subprocess.run(
        [*command, "--picture", "64x64", "--items", "32", "--scaling", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    kinds = [(point["kind"], point["ranks"]) for point in said["points"]]
    assert kinds == [("weak", 1), ("weak", 2), ("strong", 2)]
    assert all(point["images_per_s"] > 0 for point in said["points"])
    assert [bool(point["limit"]) for point in said["points"]] == [False, True, True]
    assert "all-reduce" in said["worlds"][1]["passes"][0]["stages"]


@pytest.mark.slow
def test_ranks_print_one_card_and_the_share_of_all_of_them():
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    script = str(REPOSITORY / "benchmarks" / "throughput.py")
    done = subprocess.run(
        [sys.executable, *torchrun, script, *TINY, "--picture", "64x64", "--items", "32"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bottleneck  ") == 1
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ranks"] == 2
    core_ms = {name: stage["core_ms_per_image"] for name, stage in said["stages"].items()}
    stages = core_ms.keys() - {"whole", "loader", "step"}
    assert "all-reduce" in stages
    most = said["cores"] * 1e3 / sum(core_ms[name] for name in stages)
    card = said["card"]
    assert card["ceiling_images_per_s"] == pytest.approx(most)
    assert card["of_ceiling"] == pytest.approx(card["images_per_s"] / most)
    assert f"{card['of_ceiling']:.0%} of the ceiling" in done.stdout
