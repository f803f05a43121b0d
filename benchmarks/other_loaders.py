"""Loaders of other projects, each as its users would write it, on the photographs of `loader.py`.

1. `convert` writes the same photographs in the forms that the others read.
2. `OTHERS` yields the number of pictures in each batch of one epoch, by the name of the loader.

All draw random-resized crops, flips and (with `policy`) AutoAugment, antialiased. All but the
authors' and DALI's decode and augment with torchvision on uint8 tensors, the fastest of its ways.
"""

# DALI makes its operators at run time, and mosaicml-streaming is not in every environment.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

if TYPE_CHECKING:
    from our_loaders import Setting

SCALE, ASPECT = (0.3, 1.0), (3 / 4, 4 / 3)


def convert(folder: Path, photographs: dict[str, bytes]) -> None:
    """Writes photographs by key, which lie in files already, as litdata chunks and MDS shards."""
    import litdata
    from streaming import MDSWriter

    litdata.optimize(
        fn=Path.read_bytes,
        inputs=sorted((folder / "files").iterdir()),
        output_dir=str(folder / "litdata"),
        chunk_bytes="16MB",
        num_workers=1,
    )
    with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes"}, size_limit=1 << 24) as mds:
        for content in photographs.values():
            mds.write({"jpg": content})


class TensorTransform:
    """JPEG -> uint8 crop, by torchvision on tensors."""

    def __init__(self, setting: Setting) -> None:
        policy = [v2.AutoAugment()] if setting.policy else []
        crop = v2.RandomResizedCrop(setting.size, SCALE, ASPECT, antialias=True)
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip(), *policy])

    def __call__(self, content: bytes) -> Tensor:
        """One picture."""
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return self.augment(decode_jpeg(encoded, mode=ImageReadMode.RGB))


class PictureFiles(Dataset[Tensor]):
    """Pillow and torchvision's first transforms on a folder, as MAGNeto's authors describe it."""

    def __init__(self, setting: Setting) -> None:
        self.paths = sorted((setting.folder / "files").iterdir())
        policy = [v1.AutoAugment()] if setting.policy else []
        crop = v1.RandomResizedCrop(setting.size, SCALE, ASPECT)
        normalize = v1.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.augment = v1.Compose(
            [crop, v1.RandomHorizontalFlip(), *policy, v1.ToTensor(), normalize]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(io.BytesIO(self.paths[index].read_bytes())) as image:
            return self.augment(image.convert("RGB"))


def _authors(setting: Setting) -> Iterator[int]:
    return _sizes(
        DataLoader(
            PictureFiles(setting),
            batch_size=setting.batch_size,
            shuffle=True,
            num_workers=setting.num_workers,
        )
    )


def _webdataset(setting: Setting) -> Iterator[int]:
    import webdataset

    transform = TensorTransform(setting)
    pictures = (
        webdataset.WebDataset(setting.shards, shardshuffle=100)
        .shuffle(1000)
        .map(lambda sample: transform(sample["jpg"]))
        .batched(setting.batch_size, collation_fn=torch.stack)
    )
    return _sizes(webdataset.WebLoader(pictures, batch_size=None, num_workers=setting.num_workers))


def _hugging_face(setting: Setting) -> Iterator[int]:
    import datasets

    transform = TensorTransform(setting)
    pictures = datasets.load_dataset(
        "webdataset",
        data_files={"train": setting.shards},
        split="train",
        streaming=True,
        cache_dir=str(setting.folder / "hf"),
    )
    pictures = pictures.cast_column("jpg", datasets.Image(decode=False)).shuffle(buffer_size=1000)
    return _sizes(
        DataLoader(
            pictures,
            batch_size=setting.batch_size,
            num_workers=setting.num_workers,
            collate_fn=lambda rows: torch.stack([transform(row["jpg"]["bytes"]) for row in rows]),
        )
    )


def _litdata(setting: Setting) -> Iterator[int]:
    import litdata

    transform = TensorTransform(setting)

    class Pictures(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Tensor:
            return transform(super().__getitem__(index))

    pictures = Pictures(str(setting.folder / "litdata"), shuffle=True)
    return _sizes(
        litdata.StreamingDataLoader(
            pictures, batch_size=setting.batch_size, num_workers=setting.num_workers
        )
    )


def _mosaic(setting: Setting) -> Iterator[int]:
    from streaming import StreamingDataset

    transform = TensorTransform(setting)

    class Pictures(StreamingDataset):
        def __getitem__(self, index: Any) -> Tensor:
            return transform(super().__getitem__(index)["jpg"])

    pictures = Pictures(
        local=str(setting.folder / "mds"), shuffle=True, batch_size=setting.batch_size
    )
    return _sizes(
        DataLoader(pictures, batch_size=setting.batch_size, num_workers=setting.num_workers)
    )


def _dali(setting: Setting) -> Iterator[int]:
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.auto_aug import auto_augment

    @pipeline_def(enable_conditionals=True)
    def pipeline() -> Any:
        encoded = fn.readers.webdataset(
            paths=setting.shards,
            index_paths=[f"{shard.removesuffix('.tar')}.idx" for shard in setting.shards],
            ext=["jpg"],
            random_shuffle=True,
            initial_fill=1000,
            name="reader",
        )
        image = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=SCALE, random_aspect_ratio=ASPECT
        )
        image = fn.resize(image, size=[setting.size] * 2, antialias=True)
        image = fn.flip(image, horizontal=fn.random.coin_flip())
        if setting.policy:
            image = auto_augment.auto_augment_image_net(image)
        return image

    made = pipeline(batch_size=setting.batch_size, num_threads=setting.num_workers, device_id=None)
    made.build()
    for _ in range(made.epoch_size("reader") // setting.batch_size):
        (pictures,) = made.run()
        yield len(torch.from_dlpack(pictures.as_tensor()))


def _sizes(loader: Any) -> Iterator[int]:
    return (len(pictures) for pictures in loader)


OTHERS: dict[str, Callable[[Setting], Iterator[int]]] = {
    "authors' way: Pillow, torchvision v1": _authors,
    "webdataset": _webdataset,
    "Hugging Face datasets": _hugging_face,
    "DALI webdataset reader": _dali,
    "litdata": _litdata,
    "mosaicml-streaming": _mosaic,
}
