"""Ghost batch norm: equal to nn.BatchNorm2d where that exists, and to itself however it is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from magneto_dist.model.norm import (
    GhostBatchNorm2d,
    commit_batch_norm_statistics,
    replace_batch_norms,
    reset_batch_norm_statistics,
    share_row_validity,
)

CHANNELS = 3
Rows = tuple[Tensor, Tensor, Tensor]


def make_norm(group_size: int) -> GhostBatchNorm2d:
    """A float64 norm with parameters and statistics that are not the initial ones."""
    norm = GhostBatchNorm2d(CHANNELS, group_size).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None
            tensor.copy_(torch.rand(CHANNELS, generator=generator, dtype=torch.float64) + 0.5)
    return norm


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 + 1


def train(norms: list[GhostBatchNorm2d], chunks: list[list[Rows]], *, tell: bool = True):
    """Forward, backward and commit on ranks (outer list) of micro-batches (x, upstream, valid).

    `tell` False: the norm is not told which rows are valid, for all are.
    """
    outputs, gradients = [], []
    for norm, micro_batches in zip(norms, chunks, strict=True):
        rows = share_row_validity(norm)
        for x, upstream, valid in micro_batches:
            x = x.clone().requires_grad_()
            rows.valid = valid if tell else None
            y = norm(x)
            y.backward(upstream)
            outputs.append(y.detach())
            gradients.append(x.grad)
    packed = torch.stack([norm.group_statistics for norm in norms]).sum(0)
    for norm in norms:
        commit_batch_norm_statistics(norm, lambda _: packed)
    parameters = [torch.stack([getattr(n, p).grad for n in norms]).sum(0) for p in PARAMETERS]
    return [torch.cat(outputs), torch.cat(gradients), *parameters, *running(norms[-1])]


PARAMETERS = ("weight", "bias")


def running(norm: nn.BatchNorm2d) -> list[Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    return [norm.running_mean, norm.running_var, norm.num_batches_tracked]


def plain_loops(x: Tensor, valid: Tensor, norm: GhostBatchNorm2d) -> tuple[Tensor, list, list]:
    """Outputs of valid rows, and the averages over groups, by loops over Python floats."""
    y = torch.zeros_like(x)
    means, variances = [], []
    for start in range(0, len(x), norm.group_size):
        members = [r for r in range(start, start + norm.group_size) if valid[r]]
        if not members:
            continue
        means.append([])
        variances.append([])
        for c in range(x.shape[1]):
            values = [v for r in members for line in x[r, c].tolist() for v in line]
            mean = sum(values) / len(values)
            squares = sum((v - mean) ** 2 for v in values)
            scale = norm.weight[c].item() / (squares / len(values) + norm.eps) ** 0.5
            for r in members:
                y[r, c] = (x[r, c] - mean) * scale + norm.bias[c].item()
            means[-1].append(mean)
            variances[-1].append(squares / (len(values) - 1))
    average = [[sum(c) / len(c) for c in zip(*rows, strict=True)] for rows in (means, variances)]
    return y, average[0], average[1]


@pytest.mark.parametrize(
    "fill", ["all rows valid", "all valid, not told", "some invalid", "a whole group invalid"]
)
def test_one_micro_batch_or_many_or_two_ranks_give_the_same(fill: str) -> None:
    valid = torch.ones(32, dtype=torch.bool)
    if fill == "some invalid":
        valid[[0, 5, 6, 31]] = False
    elif fill == "a whole group invalid":
        valid[8:16] = False
    x = random(0, 32, CHANNELS, 4, 5)
    upstream = random(1, *x.shape) * valid[:, None, None, None]
    data = list(zip(*(t.split(8) for t in (x, upstream, valid)), strict=True))

    def merge(pieces: list, size: int) -> list:
        groups = [pieces[i : i + size] for i in range(0, 4, size)]
        return [tuple(torch.cat(parts) for parts in zip(*group, strict=True)) for group in groups]

    tell = fill != "all valid, not told"
    whole = train([make_norm(8)], [merge(data, 4)], tell=tell)
    cuts = {
        "2 x 16": ([make_norm(8)], [merge(data, 2)]),
        "4 x 8": ([make_norm(8)], [merge(data, 1)]),
        "2 ranks": ([make_norm(8), make_norm(8)], [merge(data, 2)[:1], merge(data, 2)[1:]]),
        "3 ranks": ([make_norm(8) for _ in range(3)], [data[:1], data[1:2], merge(data, 2)[1:]]),
    }
    for name, (norms, chunks) in cuts.items():
        for a, b in zip(whole, train(norms, chunks, tell=tell), strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
    reference, mean, variance = plain_loops(x, valid, make_norm(8))
    torch.testing.assert_close(whole[0][valid], reference[valid], rtol=1e-12, atol=1e-12)
    before = running(make_norm(8))
    for got, old, average in zip(whole[4:6], before, (mean, variance), strict=False):
        expected = 0.9 * old + 0.1 * torch.tensor(average, dtype=torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert whole[6].item() == 1


@pytest.mark.parametrize("tell", [True, False])
def test_a_group_of_the_whole_batch_is_torchs_batch_norm(tell: bool) -> None:
    ghost, plain = make_norm(64), nn.BatchNorm2d(CHANNELS).double()
    plain.load_state_dict(ghost.state_dict())
    x, upstream = random(2, 6, CHANNELS, 4, 4), random(3, 6, CHANNELS, 4, 4)
    got = train([ghost], [[(x, upstream, torch.ones(6, dtype=torch.bool))]], tell=tell)
    x.requires_grad_()
    y = plain(x)
    y.backward(upstream)
    gradients = [x.grad, plain.weight.grad, plain.bias.grad]
    for a, b in zip(got, [y.detach(), *gradients, *running(plain)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ghost.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)


def test_its_state_is_torchs() -> None:
    plain = nn.BatchNorm2d(CHANNELS)
    plain(torch.randn(4, CHANNELS, 2, 2))
    ghost = GhostBatchNorm2d.like(plain, 4)
    assert ghost.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(ghost.state_dict()[key], value), key


@settings(max_examples=25)
@given(st.integers(0, 1000), st.lists(st.booleans(), min_size=8, max_size=8))
def test_invalid_rows_neither_act_nor_suffer(seed: int, validity: list[bool]) -> None:
    valid = torch.tensor(validity)
    x = random(seed, 8, CHANNELS, 2, 2)
    wild = torch.where(valid[:, None, None, None], x, torch.inf)
    upstream = random(seed + 1, *x.shape)
    quiet, loud = make_norm(4), make_norm(4)
    for a, b in zip(
        train([quiet], [[(x, upstream, valid)]]),
        train([loud], [[(wild, upstream, valid)]]),
        strict=True,
    ):
        assert bool(b.isfinite().all())
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    gradient = train([make_norm(4)], [[(x, upstream, valid)]])[1]
    assert not gradient[~valid].any()


def test_forward_moves_no_running_statistics_and_reset_forgets() -> None:
    norm = make_norm(4)
    before = [tensor.clone() for tensor in running(norm)]
    norm(random(0, 8, CHANNELS, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, running(norm), strict=True))
    reset_batch_norm_statistics(norm)
    commit_batch_norm_statistics(norm, lambda packed: packed)
    assert all(torch.equal(a, b) for a, b in zip(before, running(norm), strict=True))
    norm.eval()(random(0, 8, CHANNELS, 2, 2))
    assert not norm.group_statistics.any()


def test_statistics_of_several_norms_travel_together() -> None:
    model = nn.Sequential(make_norm(4), nn.ReLU(), make_norm(4))
    model(random(0, 8, CHANNELS, 2, 2))
    seen = []

    def reduce(packed: Tensor) -> Tensor:
        seen.append(packed.shape)
        return packed

    commit_batch_norm_statistics(model, reduce)
    assert seen == [torch.Size([2 * (1 + 2 * CHANNELS)])]
    commit_batch_norm_statistics(nn.Linear(2, 2), reduce)
    assert len(seen) == 1


def test_a_batch_that_is_no_multiple_of_the_group_is_refused() -> None:
    with pytest.raises(ValueError, match="6 rows cannot be cut into groups of 4"):
        make_norm(4)(random(0, 6, CHANNELS, 2, 2))


def test_a_single_value_moves_no_running_statistics() -> None:
    norm = make_norm(1)
    before = [tensor.clone() for tensor in running(norm)]
    y = norm(random(0, 2, CHANNELS, 1, 1))
    commit_batch_norm_statistics(norm, lambda packed: packed)
    torch.testing.assert_close(y, norm.bias.detach()[None, :, None, None].expand_as(y))
    assert all(torch.equal(a, b) for a, b in zip(before, running(norm), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_input_has_float32_statistics(dtype: torch.dtype) -> None:
    # Mean 100, deviation 1: in 16 bits the variance of such values would be noise.
    x = (random(0, 8, CHANNELS, 4, 4).float() + 100).to(dtype)
    norm = GhostBatchNorm2d(CHANNELS, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
    commit_batch_norm_statistics(norm, lambda packed: packed)
    exact = GhostBatchNorm2d(CHANNELS, 4)
    expected = exact(x.float())
    commit_batch_norm_statistics(exact, lambda packed: packed)
    assert y.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=rounding, atol=2 * rounding)
    for a, b in zip(running(norm), running(exact), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_statistics_stay_float32_in_a_sixteen_bit_model() -> None:
    norm = GhostBatchNorm2d(CHANNELS, 4).bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert running(norm)[0].dtype == norm.group_statistics.dtype == torch.float32
    for mode in (True, False):
        assert norm.train(mode)(torch.randn(4, CHANNELS, 2, 2).bfloat16()).dtype == torch.bfloat16


def test_replacing_reaches_nested_norms() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    keys = list(module.state_dict())
    replaced = replace_batch_norms(module, lambda norm: GhostBatchNorm2d.like(norm, 2))
    assert isinstance(replaced.get_submodule("1.0"), GhostBatchNorm2d)
    assert list(replaced.state_dict()) == keys
