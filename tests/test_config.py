"""Settings: names, checks, files, and the clear line for what is wrong."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from hypothesis import given
from hypothesis import strategies as st

from magneto_dist.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from magneto_dist.config_io import config_to_yaml, load_config, parse_command_line
from magneto_dist.errors import InputError

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_parse(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_configs_parse_and_leave_our_settings_to_us(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # --train.precision decides
    kinds = {"gpu_8": "MULTI_GPU", "multi_node": "MULTI_GPU", "cpu_1": "NO", "gpu_1": "NO"}
    kinds |= {"fsdp2_cpu_2": "FSDP", "fsdp2_gpu_8": "FSDP"}
    assert str(config.distributed_type).endswith(kinds.get(path.stem, "DEEPSPEED"))
    if config.deepspeed_config:
        ours = {"gradient_accumulation_steps", "gradient_clipping", "train_batch_size"}
        stage = path.stem[len("zero")]
        assert config.deepspeed_config["zero_stage"] == int(stage)
        assert f"ZeRO-{stage}" in path.read_text().splitlines()[0]
        assert not ours & config.deepspeed_config.keys()


def test_ls_is_the_papers_large_scale_setup() -> None:
    config = load_config(CONFIGS / "ls.yaml")
    model = config.model
    assert (model.backbone, model.frozen_stages, model.image_layers, model.tag_layers) == (
        "resnet50",
        4,
        2,
        6,
    )
    assert (model.d_model, model.num_heads, model.d_ff, model.dropout) == (512, 8, 2048, 0.1)
    assert (config.augment.image_size, config.train.global_batch_size) == (224, 256)
    assert (config.tags.max_tags, config.tags.beta_add, config.tags.beta_drop) == (64, 0.3, 0.3)
    assert (config.optim.lr, config.optim.momentum, config.optim.schedule) == (0.03, 0.9, "plateau")
    assert (config.optim.plateau_factor, config.optim.plateau_patience) == (0.1, 5)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = Config(output_dir="läufe/ü", model=ModelConfig(frozen_stages="all"), max_steps=3)
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_options_override_the_default_file_and_config_replaces_it(tmp_path: Path) -> None:
    default, other = tmp_path / "default.yaml", tmp_path / "other.yaml"
    default.write_text("train: {epochs: 3}\nmodel: {d_model: 64}\n")
    other.write_text("train: {epochs: 5}\n")
    config = parse_command_line("", default, ["--train.epochs", "4", "--data.path", "/data"])
    assert (config.train.epochs, config.model.d_model, config.data.path) == (4, 64, "/data")
    config = parse_command_line("", default, ["--config", str(other)])
    assert (config.train.epochs, config.model.d_model) == (5, ModelConfig().d_model)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--train.precision", "fp8"], ["train.precision", "fp8", "bf16"]),
        (["--train.epochs", "many"], ["train.epochs", "many", "int"]),
        (["--train.epochs", "0"], ["train.epochs", "0", "at least 1"]),
        (["--train.epoch_count", "3"], ["train.epoch_count", "--train.epochs"]),
        (["--model.num_heads", "7"], ["model.num_heads", "7", "divisor"]),
        (["--config", "missing.yaml"], ["config", "missing.yaml"]),
    ],
)
def test_wrong_option_is_one_line_that_names_key_given_allowed(
    argv: list[str], parts: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        parse_command_line("", CONFIGS / "demo.yaml", argv)
    assert "\n" not in str(caught.value).strip()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("content", ["train: {epoch: 3}", "nonsense: {a: 1}", "train: [", "- 3"])
def test_wrong_file_is_an_input_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(InputError):
        load_config(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataConfig(num_streams=3),
        lambda: TrainConfig(param_dtype="float64", precision="bf16"),
        lambda: OptimConfig(lr=0),
        lambda: ModelConfig(dropout=1.0),
        lambda: TrainConfig(activation_checkpointing=True, compile=True),
        lambda: TrainConfig(power_sgd_rank=0),
        lambda: TrainConfig(power_sgd_start_step=1),
        lambda: Config(
            train=TrainConfig(activation_checkpointing=True),
            model=ModelConfig(backbone_batch_norm="local"),
        ),
        lambda: Config(seed=-1),
    ],
)
def test_values_are_checked_where_they_are_made(make) -> None:
    with pytest.raises(InputError, match="--"):
        make()


@given(st.integers(-5, 70))
def test_streams_are_powers_of_two(num_streams: int) -> None:
    if num_streams in (1, 2, 4, 8, 16, 32, 64):
        DataConfig(num_streams=num_streams)
    else:
        with pytest.raises(InputError):
            DataConfig(num_streams=num_streams)


def test_every_setting_is_documented() -> None:
    source = (CONFIGS.parent / "magneto_dist" / "config.py").read_text()
    lines = [line.strip() for line in source.splitlines()]
    for section in [Config(), *(v for v in vars(Config()).values() if is_dataclass(v))]:
        for field in fields(section):
            if is_dataclass(getattr(section, field.name)):
                continue
            position = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}: "))
            assert lines[position + 1].startswith('"""'), field.name
