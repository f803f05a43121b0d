"""Backbone: stages, weights, and what "frozen" means."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms.v2.functional import normalize

from magneto_dist.config import ModelConfig
from magneto_dist.errors import InputError
from magneto_dist.model.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    build_backbone,
    recompute_activations,
)
from magneto_dist.model.norm import (
    GhostBatchNorm2d,
    commit_batch_norm_statistics,
    share_row_validity,
)

REAL_WEIGHTS = (
    Path(__file__).parents[3] / "shared" / "weights" / "mobilenet_v2_imagenet_dequantised.pth"
)


def build(backbone: str = "resnet18", **settings) -> Backbone:
    return build_backbone(ModelConfig(backbone=backbone, **settings))


def pixels(items: int = 2, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (items, 3, size, size), dtype=torch.uint8, generator=generator)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def train_step(backbone: Backbone) -> set[str]:
    """One step of SGD; returns the names of what it moved, buffers included."""
    before = snapshot(backbone)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    backbone.train()
    backbone(pixels(4)).square().mean().backward()
    torch.optim.SGD(trained, lr=1.0).step()
    after = backbone.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize(
    ("name", "stages", "channels", "grid"),
    [
        ("resnet18", None, 512, 2),
        ("resnet18", 1, 64, 16),
        ("resnet18", 3, 128, 8),
        ("resnet50", 2, 256, 16),
        ("mobilenet_v2", None, 1280, 2),
        ("mobilenet_v2", 3, 24, 16),
        ("regnet_y_400mf", 2, 48, 16),
        ("squeezenet1_1", None, 512, 3),
        ("efficientnet_b0", 3, 24, 16),
        ("densenet121", 4, 64, 16),
        ("convnext_tiny", 1, 96, 16),
    ],
)
def test_stages_and_channels(name: str, stages: int | None, channels: int, grid: int) -> None:
    backbone = build(name, backbone_stages=stages).eval()
    assert backbone.out_channels == channels
    assert stages is None or len(backbone.stages) == stages
    with torch.no_grad():
        assert backbone(pixels(1, 64)).shape == (1, channels, grid, grid)


def test_stages_of_a_resnet_are_stem_and_four_layers() -> None:
    backbone = build()
    names = [name for name, _ in backbone.stages.named_children()]
    assert names == ["stem", "layer1", "layer2", "layer3", "layer4"]


def test_pixels_are_normalised_as_torchvision_does() -> None:
    reference = models.resnet18(weights=None).eval()
    backbone = build().eval()
    backbone.stages.stem.load_state_dict(
        {k: v for k, v in reference.state_dict().items() if k.startswith(("conv1", "bn1"))}
    )
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        backbone.stages.get_submodule(layer).load_state_dict(
            reference.get_submodule(layer).state_dict()
        )
    x = normalize(pixels().float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    for layer in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        x = reference.get_submodule(layer)(x)
    torch.testing.assert_close(backbone(pixels()), x, rtol=1e-4, atol=1e-5)


def test_float64_and_channels_last() -> None:
    backbone = build(backbone_stages=2).double().eval()
    exact = backbone(pixels())
    assert exact.dtype == torch.float64
    fast = backbone.float().to(memory_format=torch.channels_last)(pixels())  # type: ignore
    assert fast.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "swin_t"])
def test_networks_without_a_grid_of_features_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}.*resnet.*mobilenet"):
        build(name)


def test_unknown_networks_and_too_many_stages_are_refused() -> None:
    with pytest.raises(InputError, match="no such classification model"):
        build("resnet19")
    with pytest.raises(InputError, match="resnet18 has 5 stages: stem, layer1"):
        build(backbone_stages=6)


@pytest.mark.parametrize("frozen", [0, 2, 4, 5, "all", 9])
def test_freezing_by_stage(frozen) -> None:
    backbone = build(frozen_stages=frozen, backbone_batch_norm="local")
    expected = {"all": 5, 9: 5}.get(frozen, frozen)
    for index, stage in enumerate(backbone.stages):
        is_frozen = index < expected
        assert all(p.requires_grad != is_frozen for p in stage.parameters())
        assert all(m.training != is_frozen for m in stage.modules())


def test_three_frozen_blocks_of_the_paper_are_stem_and_three_layers() -> None:
    trained = {name for name, p in build().named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("stages.layer4.") for name in trained)


@pytest.mark.parametrize("kind", ["frozen", "local", "ghost"])
def test_a_step_moves_the_trained_stages_alone(kind: str) -> None:
    backbone = build(
        backbone_stages=3, frozen_stages=2, backbone_batch_norm=kind, batch_norm_group_size=2
    )
    moved = train_step(backbone)
    trained = {name for name, _ in backbone.stages.layer2.named_parameters(prefix="stages.layer2")}
    running = {f"stages.{n}" for n, _ in backbone.stages.named_buffers() if n.startswith("layer2")}
    norms = {name for name in trained if ".bn" in name or "downsample.1" in name}
    statistics = running & set(backbone.state_dict())
    assert (
        moved
        == {
            "frozen": trained - norms,
            "local": trained | statistics,
            "ghost": trained,  # statistics move at the commit
        }[kind]
    )


@pytest.mark.parametrize("kind", ["frozen", "ghost"])
def test_drifting_statistics_of_frozen_stages_are_all_of_them_that_moves(kind: str) -> None:
    backbone = build(
        backbone_stages=3,
        frozen_stages=2,
        backbone_batch_norm=kind,
        frozen_batch_norm="drifting",
        batch_norm_group_size=4,
    )
    before = snapshot(backbone)
    train_step(backbone)
    commit_batch_norm_statistics(backbone, lambda packed: packed)
    after = backbone.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    of_frozen = {name for name in moved if not name.startswith("stages.layer2.")}
    norms = [n for n, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d)]
    frozen_norms = [name for name in norms if not name.startswith("stages.layer2.")]
    running = ("running_mean", "running_var", "num_batches_tracked")
    assert of_frozen == {f"{name}.{part}" for name in frozen_norms for part in running}
    layer2_drifts = "stages.layer2.0.bn1.running_mean" in moved
    assert layer2_drifts == (kind == "ghost")


def test_drifting_statistics_are_those_that_a_batch_norm_in_training_mode_has() -> None:
    drifting = build(
        backbone_stages=1, frozen_stages=1, frozen_batch_norm="drifting", batch_norm_group_size=4
    )
    plain = build(backbone_stages=1, frozen_stages=0, backbone_batch_norm="local")
    plain.load_state_dict(drifting.state_dict())
    assert not drifting.train()(pixels(4)).requires_grad
    torch.testing.assert_close(drifting(pixels(4)), plain.train()(pixels(4)))
    commit_batch_norm_statistics(drifting, lambda packed: packed)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(drifting.state_dict()[name], tensor, msg=name)
    before = snapshot(drifting)
    torch.testing.assert_close(drifting.eval()(pixels(4)), plain.eval()(pixels(4)))
    commit_batch_norm_statistics(drifting, lambda packed: packed)
    assert all(torch.equal(before[name], t) for name, t in drifting.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_folded_batch_norms_change_nothing(name: str) -> None:
    backbone = build(name, frozen_stages="all").double()
    generator = torch.Generator().manual_seed(1)
    for tensor in (t for n, t in backbone.state_dict().items() if "running" in n):
        tensor.uniform_(0.5, 2, generator=generator)
    before = snapshot(backbone)
    x = pixels(1, 64).double() * backbone.scale + backbone.shift
    expected = x
    with torch.no_grad():
        for stage in backbone.stages:
            expected = stage(expected)
    torch.testing.assert_close(backbone(pixels(1, 64)), expected, rtol=1e-9, atol=1e-12)
    assert before.keys() == backbone.state_dict().keys()


def test_frozen_batch_norms_are_folded_away() -> None:
    backbone = build(frozen_stages=2, backbone_stages=3)
    ran = []
    for name, module in backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    backbone(pixels())
    assert ran
    assert all(name.startswith("stages.layer2.") for name in ran)


def test_weights_that_zero_3_owns_are_not_folded() -> None:
    """They may all be here for a while; a copy of their modules would ask DeepSpeed for its own."""
    backbone = build(frozen_stages="all", backbone_stages=2)
    expected, ran = backbone(pixels()), []
    for number, (name, module) in enumerate(backbone.named_modules()):
        for weight in module.parameters(recurse=False):
            weight.ds_id = number
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    torch.testing.assert_close(backbone(pixels()), expected, rtol=1e-4, atol=1e-5)
    assert ran


def test_folding_follows_what_is_loaded_and_cast() -> None:
    backbone = build(frozen_stages="all", backbone_stages=2)
    old = backbone(pixels())
    torch.manual_seed(5)
    backbone.load_state_dict(build(frozen_stages="all", backbone_stages=2).state_dict())
    new = backbone(pixels())
    assert not torch.allclose(old, new)
    cast = backbone.double()(pixels())
    assert cast.dtype == torch.float64
    torch.testing.assert_close(cast.float(), new, rtol=1e-4, atol=1e-5)


def test_frozen_stages_have_no_graph() -> None:
    assert not build(frozen_stages="all", backbone_stages=2)(pixels()).requires_grad
    assert build(frozen_stages=1, backbone_stages=2)(pixels()).requires_grad


@pytest.mark.parametrize("kind", ["ghost", "frozen"])
@pytest.mark.parametrize("valid", [None, [True, True, False, True]])
def test_recomputed_activations_change_nothing_but_what_is_kept(
    kind: str, valid: list[bool] | None
) -> None:
    """Gradients and running statistics bit for bit; rows that are no samples stay out of both."""

    def train(*, recompute: bool) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(0)
        backbone = build(
            frozen_stages=1,
            backbone_stages=3,
            backbone_batch_norm=kind,
            batch_norm_group_size=2,
        )
        if recompute:
            recompute_activations(backbone)
        rows = share_row_validity(backbone)
        kept_bytes = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept_bytes
            kept_bytes += tensor.nbytes
            return tensor

        for _ in range(2):  # micro-batches of a step
            rows.valid = None if valid is None else torch.tensor(valid)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                features = backbone(pixels(4))
            rows.valid = None  # as its owner does, before the backward pass
            features.square().mean().backward()
            assert rows.are_counted
        commit_batch_norm_statistics(backbone, lambda sums: sums)
        grads = {f"{n}.grad": p.grad for n, p in backbone.named_parameters() if p.requires_grad}
        return {**backbone.state_dict(), **grads}, kept_bytes

    (plain, plain_bytes), (again, again_bytes) = train(recompute=False), train(recompute=True)
    assert plain.keys() == again.keys()
    for name, tensor in plain.items():
        assert tensor is not None
        assert torch.equal(again[name], tensor), name
    moved = [n for n, tensor in again.items() if n.endswith("num_batches_tracked") and tensor]
    assert bool(moved) == (kind == "ghost")
    assert again_bytes < plain_bytes / 2


def test_kinds_of_batch_norm_share_one_state_dict() -> None:
    states = {}
    for kind in ("ghost", "frozen", "local", "sync"):
        torch.manual_seed(0)
        backbone = build(backbone_stages=2, frozen_stages=1, backbone_batch_norm=kind)
        states[kind] = backbone.state_dict()
        norms = [m for m in backbone.stages.layer1.modules() if "BatchNorm" in type(m).__name__]
        expected = {"ghost": GhostBatchNorm2d, "sync": nn.SyncBatchNorm}.get(kind, nn.BatchNorm2d)
        assert [type(norm) for norm in norms] == [expected] * 4
        assert type(backbone.stages.get_submodule("stem.bn1")) is nn.BatchNorm2d
    for state in states.values():
        assert state.keys() == states["local"].keys()
        assert all(torch.equal(state[key], states["local"][key]) for key in state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_a_file_whatever_its_head(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    source = models.resnet18(weights=None, num_classes=7)
    save = save_file if suffix == ".safetensors" else torch.save
    save(source.state_dict(), path)
    backbone = build(backbone_weights=str(path))
    layer = source.layer4.state_dict()
    loaded = backbone.stages.layer4.state_dict()
    assert all(torch.equal(loaded[key], layer[key]) for key in layer)


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_unsuitable_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    state = models.resnet18(weights=None).state_dict()
    wrong_shape = {**state, "layer1.0.conv1.weight": torch.zeros(1, 1, 3, 3)}
    files = {
        "missing.pth": {k: v for k, v in state.items() if k != "layer1.0.conv1.weight"},
        "unexpected.pth": {**state, "layer9.weight": torch.zeros(1)},
        "shape.pth": wrong_shape,
        "list.pth": [1, 2],
        "hostile.pth": Hostile(tmp_path / "owned"),
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    expected = {
        "missing.pth": "1 missing .first layer1.0.conv1.weight.",
        "unexpected.pth": "1 unexpected .first layer9.weight.",
        "shape.pth": "size mismatch",
        "list.pth": "not a dictionary of tensors",
        "hostile.pth": "no plain state_dict",
        "text.pth": "no plain state_dict",
        "text.safetensors": "no plain state_dict",
        "absent.pth": "no such file",
    }
    for name, message in expected.items():
        with pytest.raises(InputError, match=message) as raised:
            build(backbone_weights=str(tmp_path / name))
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "owned").exists()


def test_imagenet_weights_offline_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match="pass the path of a state_dict"):
        build(backbone_weights="imagenet")


@pytest.mark.skipif(not REAL_WEIGHTS.is_file(), reason=f"no file {REAL_WEIGHTS}")
def test_real_imagenet_weights_give_torchvisions_features() -> None:
    reference = models.mobilenet_v2(weights=None).eval()
    reference.load_state_dict(torch.load(REAL_WEIGHTS, weights_only=True))
    backbone = build("mobilenet_v2", backbone_weights=str(REAL_WEIGHTS), frozen_stages="all")
    x = normalize(pixels(2, 64).float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    with torch.no_grad():
        expected = reference.features(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(backbone(pixels(2, 64)), expected, rtol=1e-3, atol=1e-4)
