"""Frozen stages in 16 bits: close to float32, and nothing else of the model is touched."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_backbone import REAL_WEIGHTS, build, pixels, snapshot
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from magneto_dist.config import Config, ModelConfig, TrainConfig
from magneto_dist.config_io import config_to_yaml
from magneto_dist.errors import InputError
from magneto_dist.model.folding import FoldedStages, fast_precision
from magneto_dist.training.resume import settled_precision

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
# Relative to all features, by their norm: some 20 and 40 times what one number is rounded by. A
# MobileNetV2 is a hard case, 52 convolutions with linear bottlenecks: 0.082 and 0.020 were seen,
# under torch's autocast as well as here.
BOUNDS = {torch.bfloat16: 0.12, torch.float16: 0.03}
# After the 7 and 20 convolutions of small ResNets.
SMALL = 0.03


def distance(ours: Tensor, reference: Tensor) -> float:
    """Of `ours` from `reference`, relative to its norm."""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def photographs(count: int, size: int) -> Tensor:
    found = sorted(PHOTOS.glob("*.jpg"))[:count]
    pictures = [Image.open(path).convert("RGB").resize((size, size)) for path in found]
    return torch.stack([pil_to_tensor(picture) for picture in pictures])


@pytest.mark.skipif(
    not (REAL_WEIGHTS.is_file() and PHOTOS.is_dir()),
    reason=f"the photographs {PHOTOS} and the weights {REAL_WEIGHTS} are not both here",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_photographs_through_real_weights_stay_within_a_bound(dtype: torch.dtype) -> None:
    backbone = build("mobilenet_v2", backbone_weights=str(REAL_WEIGHTS), frozen_stages="all")
    pictures = photographs(8, 64)
    reference = backbone(pictures)
    assert reference.std() > 0.1
    x = pictures * backbone.scale + backbone.shift
    features = FoldedStages()(list(backbone.stages), x, dtype)
    assert 2.0**-13 < distance(features, reference) < BOUNDS[dtype]
    assert features.dtype == torch.float32
    unfolded = distance(backbone.stages(x), reference)
    assert unfolded < 1e-5
    if dtype == torch.bfloat16:
        backbone.frozen_dtype = dtype
        assert torch.equal(backbone(pictures), features)


@pytest.mark.parametrize("frozen", [2, "all"])
def test_nothing_but_the_output_changes(frozen) -> None:
    """No weight, no statistic, no name of either, no graph; what is trained is trained."""
    backbone = build(frozen_stages=frozen, backbone_stages=3, frozen_precision="bf16").train()
    plain = build(frozen_stages=frozen, backbone_stages=3)
    plain.load_state_dict(backbone.state_dict())
    before, parameters = snapshot(backbone), dict(backbone.named_parameters())
    inputs = []
    layer2 = backbone.stages.get_submodule("layer2.0")
    layer2.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    features = backbone(pixels(4))
    assert features.dtype == torch.float32
    assert features.requires_grad == (frozen == 2)
    assert 2.0**-12 < distance(features, plain(pixels(4))) < SMALL
    if frozen == 2:
        assert [(x.dtype, x.requires_grad) for x in inputs] == [(torch.float32, False)]
        features.square().mean().backward()
    after = backbone.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameters[name] is p for name, p in backbone.named_parameters())
    with_gradient = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in backbone.named_parameters() if p.requires_grad}


def test_the_convolutions_get_channels_last_pictures_in_16_bits_and_no_batch_norm_runs() -> None:
    backbone = build(frozen_stages="all", frozen_precision="bf16")
    backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    backbone(pixels(4, 64))
    seen = []
    _, copy = backbone._folded._made
    for module in copy.modules():
        assert not isinstance(module, nn.BatchNorm2d)
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: seen.append((m.weight, x[0], y)))
    backbone(pixels(4, 64))
    assert len(seen) == 20
    for tensor in (t for each in seen for t in each):
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous(memory_format=torch.channels_last) or tensor.shape[1] == 3


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_what_follows(autocast: torch.dtype) -> None:
    backbone = build(frozen_stages="all", backbone_stages=2, frozen_precision="bf16")
    plain = backbone(pixels())
    with torch.autocast("cpu", autocast):
        mixed = backbone(pixels())
    assert mixed.dtype == autocast
    assert torch.equal(mixed, plain.to(autocast))


def test_it_follows_what_is_loaded() -> None:
    backbone = build(frozen_stages="all", backbone_stages=2, frozen_precision="bf16")
    old = backbone(pixels())
    torch.manual_seed(5)
    other = build(frozen_stages="all", backbone_stages=2)
    backbone.load_state_dict(other.state_dict())
    assert distance(old, other(pixels())) > 0.1
    assert distance(backbone(pixels()), other(pixels())) < SMALL


def test_weights_that_zero_3_owns_run_as_they_are_in_16_bits() -> None:
    backbone = build(frozen_stages="all", backbone_stages=2, frozen_precision="bf16")
    folded, ran = backbone(pixels()), []
    for number, module in enumerate(backbone.modules()):
        for weight in module.parameters(recurse=False):
            weight.ds_id = number  # type: ignore[attr-defined]
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, x, y: ran.append(y.dtype))
    as_they_are = backbone(pixels())
    assert ran
    assert set(ran) == {torch.bfloat16}
    assert as_they_are.dtype == torch.float32
    assert distance(as_they_are, folded) < SMALL


@pytest.mark.slow
def test_compiled_stages_run_in_16_bits() -> None:
    backbone = build(frozen_stages=1, backbone_stages=2, frozen_precision="bf16").eval()
    eager = backbone(pixels())
    backbone.compile()
    compiled = backbone(pixels())
    assert compiled.dtype == torch.float32
    assert distance(compiled, eager) < SMALL
    backbone.frozen_dtype = None
    exact = backbone(pixels())
    assert distance(compiled, exact) > 2.0**-12


def test_what_a_gpu_has_trained_in_fp16_a_processor_does_in_float32() -> None:
    backbone = build(frozen_stages="all", backbone_stages=2, frozen_precision="fp16")
    features = backbone(pixels())
    backbone.frozen_dtype = None
    assert torch.equal(features, backbone(pixels()))


def test_auto_asks_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has_instructions, precision, dtype in ((True, "bf16", torch.bfloat16), (False, "no", None)):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda has=has_instructions: has
        )
        assert fast_precision() == precision
        assert build(backbone_stages=1, frozen_precision="auto").frozen_dtype == dtype
    drifting = build(backbone_stages=1, frozen_precision="auto", frozen_batch_norm="drifting")
    assert drifting.frozen_dtype is None


@pytest.mark.parametrize(
    ("capability", "has_bf16", "precision"),
    [
        ((9, 0), True, "bf16"),
        ((8, 6), True, "bf16"),
        ((7, 5), False, "fp16"),
        ((6, 1), False, "no"),
    ],
)
def test_auto_asks_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has_bf16: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert fast_precision() == precision


def test_a_run_records_what_auto_means_and_keeps_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settled(config: Config, checkpoint: Path | None = None) -> str:
        return settled_precision(config, checkpoint)

    auto = Config(model=ModelConfig(frozen_precision="auto"))
    monkeypatch.setattr("magneto_dist.model.backbone.fast_precision", lambda: "bf16")
    assert settled(auto) == "bf16"
    assert settled(Config()) == "no"
    nothing_frozen = ModelConfig(frozen_precision="auto", frozen_stages=0)
    assert settled(replace(auto, model=nothing_frozen)) == "no"
    assert settled(replace(auto, train=TrainConfig(precision="fp16"))) == "fp16"
    assert settled(replace(auto, train=TrainConfig(param_dtype="float64"))) == "no"
    begun = replace(auto, model=ModelConfig(frozen_precision="no"))
    (tmp_path / "config.yaml").write_text(config_to_yaml(begun), encoding="utf-8")
    assert settled(auto, tmp_path) == "no"
    explicit = replace(auto, model=ModelConfig(frozen_precision="bf16"))
    assert settled(explicit, tmp_path) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--model.frozen_precision fp16 needs a GPU"):
        settled(replace(auto, model=ModelConfig(frozen_precision="fp16")))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ModelConfig(frozen_precision="bf16", frozen_stages=0), "nothing is frozen"),
        (
            lambda: ModelConfig(frozen_precision="fp16", frozen_batch_norm="drifting"),
            "statistics move",
        ),
        (
            lambda: Config(
                model=ModelConfig(frozen_precision="bf16"), train=TrainConfig(param_dtype="float64")
            ),
            "--train.param_dtype float64",
        ),
    ],
)
def test_contradictions_are_one_clear_line(make, reason: str) -> None:
    with pytest.raises(
        InputError, match=r"--model.frozen_precision .*must be no or auto.*"
    ) as raised:
        make()
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
