"""Flags of the process launcher against our configuration, without launching anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from magneto_dist.config import Precision, TrainConfig
from magneto_dist.errors import InputError, ReportedError
from magneto_dist.training.launch_flags import check_launch


@pytest.fixture(autouse=True)
def launched_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def launch_with_file(monkeypatch: pytest.MonkeyPatch, path: Path, settings: object) -> None:
    path.write_text(json.dumps(settings))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("DYNAMO_BACKEND", "INDUCTOR", "inductor.*--train.compile true"),
        ("MIXED_PRECISION", "bf16", "bf16.*--train.precision no"),
        ("GRADIENT_ACCUMULATION_STEPS", "2", "2 gradient accumulation steps"),
        ("GRADIENT_CLIPPING", "1.0", "clipping 1.0.*--optim.clip_norm 0.5"),
        ("GRADIENT_CLIPPING", "much", "clipping much.*--optim.clip_norm 0.5"),
        ("USE_FSDP", "true", "configured for FSDP version 1: set fsdp_version: 2"),
        ("DEEPSPEED_CONFIG_FILE", "/nowhere.json", "/nowhere.json cannot be read"),
    ],
)
def test_flags_that_contradict_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_launch(TrainConfig(), 0.5, has_gpu=True)
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(InputError, match=said):
        check_launch(TrainConfig(), 0.5, has_gpu=True)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ReportedError):  # said by the main process alone
        check_launch(TrainConfig(), 0.5, has_gpu=True)


@pytest.mark.parametrize(
    ("settings", "precision", "said"),
    [
        ({"gradient_clipping": 1.0}, "no", "clipping 1.0.*--optim.clip_norm 0.5"),
        ({"gradient_clipping": 0}, "no", "clipping 0,"),
        ({"fp16": {"enabled": True}}, "no", "fp16 enabled true.*--train.precision no"),
        ({"bf16": {"enabled": True}}, "bf16", "bf16 enabled true.*--train.precision bf16"),
        ({"gradient_accumulation_steps": 4}, "no", "4 gradient accumulation steps"),
        ([], "no", "no JSON object"),
    ],
)
def test_deepspeed_files_that_contradict_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: object,
    precision: Precision,
    said: str,
) -> None:
    launch_with_file(monkeypatch, tmp_path / "zero.json", settings)
    with pytest.raises(InputError, match=f"zero.json.*{said}"):
        check_launch(TrainConfig(precision=precision), 0.5, has_gpu=True)


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({"zero_optimization": {"stage": 2}}, "no"),
        ({"gradient_clipping": "auto", "fp16": {"enabled": "auto"}}, "no"),
        ({"gradient_clipping": 0.5, "bf16": {"enabled": False}}, "bf16"),
        ({"gradient_accumulation_steps": 1, "bf16": {"loss_scale": 0}}, "no"),
    ],
)
def test_deepspeed_files_that_agree_are_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: object, precision: Precision
) -> None:
    launch_with_file(monkeypatch, tmp_path / "zero.json", settings)
    for name, value in (("GRADIENT_CLIPPING", "auto"), ("DYNAMO_BACKEND", "NO")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    check_launch(TrainConfig(precision=precision), 0.5, has_gpu=True)


def test_fp16_is_refused_under_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launch(TrainConfig(precision="fp16"), 0.5, has_gpu=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="fp16 is for DDP; with DeepSpeed use bf16"):
        check_launch(TrainConfig(precision="fp16"), 0.5, has_gpu=True)


def test_clipping_does_not_matter_where_nothing_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launch_with_file(monkeypatch, tmp_path / "zero.json", {"gradient_clipping": 1.0})
    check_launch(TrainConfig(), None, has_gpu=True)


def test_comm_hooks_are_for_ddp(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(ddp_comm_hook="fp16")
    check_launch(config, 0.5, has_gpu=True)
    assert "fp16 does nothing: there is one process" in capsys.readouterr().err
    check_launch(config, None, has_gpu=True)  # scoring a run that was trained with it
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(config, 0.5, has_gpu=True)
    assert not capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match=r"--train.ddp_comm_hook fp16 is for DDP"):
        check_launch(config, 0.5, has_gpu=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FSDP_OFFLOAD_PARAMS", "set fsdp_offload_params: false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "use --train.activation_checkpointing true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "leave it out"),
    ],
)
def test_what_fsdp_does_not_do_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launch(TrainConfig(), 0.5, has_gpu=False)
    monkeypatch.setenv(name, "true")
    with pytest.raises(InputError, match=f"{name}=true under FSDP: .*{said}"):
        check_launch(TrainConfig(), 0.5, has_gpu=True)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (TrainConfig(ema_decay=0.9), "--train.ema_decay needs whole weights"),
        (TrainConfig(ddp_comm_hook="fp16"), "fp16 is for DDP, and FSDP moves"),
    ],
)
def test_what_needs_whole_weights_is_refused_under_fsdp(
    monkeypatch: pytest.MonkeyPatch, config: TrainConfig, said: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_launch(config, None, has_gpu=False)  # scoring a run that was trained with it
    with pytest.raises(InputError, match=said):
        check_launch(config, 0.5, has_gpu=False)


@pytest.mark.parametrize(
    ("restarts", "shares_store", "warns"),
    [("3", "True", True), ("3", "False", False), ("0", "True", False)],
)
def test_restarts_with_a_store_that_outlives_processes_are_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    restarts: str,
    shares_store: str,
    warns: bool,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shares_store)
    monkeypatch.setenv("RANK", "0")
    check_launch(TrainConfig(), None, has_gpu=False)
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err) == warns
