"""Items through slots of shared memory: whole, alone in their memory, and the slots used again."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from magneto_dist.config import AugmentConfig, Config, TagsConfig
from magneto_dist.data.micro_batch import MicroBatches
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.parcels import Packing, Unpacking, empty
from magneto_dist.data.pool import run_loader

PIXELS = 300_000  # above what counts as large


@dataclass(frozen=True)
class Item:
    pixels: Tensor
    numbers: Tensor
    content: tuple[bytes, ...]
    name: str


class Items(Dataset[Item]):
    def __getitem__(self, token: int) -> Item:
        pixels = torch.full((PIXELS + 1000 * (token % 3),), token % 256, dtype=torch.uint8)
        return Item(pixels, torch.arange(token), (b"%d" % token,), f"item {token}")


class InPlace(Dataset[Item]):
    """As Items, but the pixels are made where they are sent from; some are made and not sent."""

    def __getitem__(self, token: int) -> Item:
        empty(PIXELS, dtype=torch.uint8)
        if token == 7:
            raise KeyError("a bug")
        pixels = empty(PIXELS // 100, 50, 2, dtype=torch.uint8).permute(2, 0, 1).fill_(token)
        other = empty(2, PIXELS, dtype=torch.float64)[1].fill_(token / 2)
        return Item(pixels, other, (), f"item {token}")


class Given(Dataset[object]):
    def __init__(self, *items: object) -> None:
        self.items = items

    def __getitem__(self, token: int) -> object:
        return self.items[token]


def sent(item: object) -> object:
    return Unpacking(pin=False)(Packing(Given(item))[0])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.int64, torch.float64, torch.bfloat16]
)
@pytest.mark.parametrize("size", [10, 100, 400])  # of the largest: 64, 640 and 2560 kB
def test_tensors_arrive_as_they_were(dtype, size):
    values = torch.arange(size * 800).remainder(2).to(dtype).reshape(4, -1, size, 4)
    forms = (
        values,
        values.permute(0, 3, 1, 2),  # channels last
        values.transpose(1, 2),
        values[:, ::2],  # with gaps
        values[1],  # a part of a larger storage
        values[:0],
    )
    for tensor in forms:
        arrived = sent({"a": [tensor, 3]})["a"][0]
        assert arrived.dtype == tensor.dtype
        assert torch.equal(arrived, tensor)
    assert sent(forms[1]).is_contiguous(memory_format=torch.channels_last)


def test_everything_else_arrives_as_it_was():
    for rest in (None, "text", (b"\0" * 5_000_000, b""), ["x"] * 300_000, ValueError("bad")):
        arrived = sent((rest, torch.ones(PIXELS)))
        assert repr(arrived[0]) == repr(rest)
        assert torch.equal(arrived[1], torch.ones(PIXELS))
        assert repr(sent(rest)) == repr(rest)


def test_slot_is_used_again_when_the_last_tensor_of_it_is_dropped():
    packing, unpack = Packing(Items()), Unpacking(pin=False)
    kept = [unpack(packing[token]) for token in range(3)]
    part = kept[0].pixels[5:9]
    assert len(packing._slots) == 3
    del kept[0]
    unpack(packing[3])
    assert len(packing._slots) == 4  # `part` lies in the first
    assert part.tolist() == [0] * 4
    del part
    for token in range(4, 40):
        assert unpack(packing[token]).pixels.unique().tolist() == [token]
    assert len(packing._slots) == 4
    assert [item.pixels.unique().tolist() for item in kept] == [[1], [2]]


def test_tensor_that_lies_in_a_slot_is_not_copied():
    packing, unpack = Packing(InPlace()), Unpacking(pin=False)
    for token in range(20):
        if token == 7:
            with pytest.raises(KeyError):
                packing[token]
            continue
        parcel = packing[token]
        item = unpack(parcel)
        assert item.pixels.unique().tolist() == [token]
        assert item.pixels.shape == (2, PIXELS // 100, 50)
        assert item.numbers.unique().tolist() == [token / 2]
        assert len(packing._slots) == 3, "what was not sent is free again"
        assert (parcel.places[0].memory is None) == (token > 0)
        del item
    assert empty(PIXELS, dtype=torch.uint8).untyped_storage().nbytes() == PIXELS


def test_pixels_are_decoded_into_the_memory_that_is_sent(small_dataset):
    config = Config(augment=AugmentConfig(image_size=224), tags=TagsConfig(max_tags=8))
    plan = BatchPlan.derive(4, 1, 4, 1)
    made = MicroBatches(small_dataset, "train", config, 0, plan, training=True, pictures="decoded")
    packing = Packing(made)
    (place,) = packing[1].places
    assert place.start == 64, "where `empty` puts it; a copy would need another slot"
    assert len(packing._slots) == 1
    assert torch.equal(place.view(packing._slots[0]), made[1].pixels)


def test_slot_grows():
    packing, unpack = Packing(Given(torch.ones(PIXELS), torch.ones(3 * PIXELS))), Unpacking(False)
    for token in (0, 1, 0, 1):
        assert unpack(packing[token]).sum() == (2 * token + 1) * PIXELS
    assert len(packing._slots) == 1


def test_items_of_processes_stay_as_they_are_while_others_arrive():
    items = list(run_loader(Items(), range(40), num_workers=3, prefetch=2, pin=False))
    gc.collect()
    for token, item in enumerate(items):
        assert item.name == f"item {token}"
        assert item.pixels.unique().tolist() == [token]
        assert item.numbers.tolist() == list(range(token))
