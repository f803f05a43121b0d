"""The text files of NUS-WIDE as people have them: zip archives or unpacked, whole or by split.

1. `_Files` finds a file by its name, wherever it lies.
2. `_ImageLists` says which images there are, and which list names them.
3. `_flags` reads a table of 0 and 1 over all images, from one file or from one for each list.

    ImageList/Imagelist.txt, TrainImagelist.txt, TestImagelist.txt   category\\number_id.jpg
    ConceptsList/Concepts81.txt
    Groundtruth/AllLabels/Labels_CONCEPT.txt                         one 0 or 1 a line
      or Groundtruth/TrainTestLabels/Labels_CONCEPT_Train.txt, ..._Test.txt
    NUS_WID_Tags/AllTags81.txt                                       81 of 0 or 1 a line
      or NUS_WID_Tags/Train_Tags81.txt, Test_Tags81.txt
"""

from __future__ import annotations

import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Bool, Int

from magneto_dist.errors import InputError
from magneto_dist.vocabulary import Vocabulary

LISTS = {"train": "Train", "validation": "Test"}
"""What the distribution calls our splits."""
_BAD_VALUE = b"-1130179"  # once in the distribution, among labels of "lake"; meant: 0


@dataclass(frozen=True)
class Distribution:
    """What the files say, image by image, in the order of the image list."""

    vocabulary: Vocabulary
    """The concepts."""
    paths: list[str]
    """Of the pictures, with slashes."""
    rows: dict[str, Int[np.ndarray, " listed"]]
    """Split -> the images of its official list."""
    ground_truth: Bool[np.ndarray, "image concept"]
    tags: Bool[np.ndarray, "image concept"]


def read_distribution(root: Path) -> Distribution:
    """Reads all that is needed of the text files below `root`.

    Raises:
        InputError: a file is absent or does not fit the others.
    """
    files = _Files(root)
    vocabulary = Vocabulary(files.lines("Concepts81.txt"))
    lists = _ImageLists(files)

    def labels_of(concept: str) -> Bool[np.ndarray, "image 1"]:
        return _flags(files, f"Labels_{concept}.txt", f"Labels_{concept}_{{}}.txt", lists, 1)

    with ThreadPoolExecutor() as threads:  # unzipping and numpy let them run side by side
        tags = threads.submit(
            _flags, files, "AllTags81.txt", "{}_Tags81.txt", lists, len(vocabulary)
        )
        ground_truth = np.concatenate([*threads.map(labels_of, vocabulary.tags)], axis=1)
    return Distribution(vocabulary, lists.paths, lists.rows, ground_truth, tags.result())


def item_id(path: str) -> str:
    """2124494179 of actor/0001_2124494179.jpg."""
    return path.rpartition("/")[2].rpartition("_")[2].partition(".")[0]


class _Files:
    """The text files of the distribution by name; each name occurs once in it."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise InputError(f"{root}: is no folder")
        self._root = root
        self._places: dict[str, tuple[Path, str | None]] = {}
        for archive in sorted(root.glob("*.zip")):
            for member in self._members(archive):
                self._places[PurePosixPath(member).name] = (archive, member)
        for pattern in ("*.txt", "*/*.txt", "*/*/*.txt"):
            for path in sorted(root.glob(pattern)):
                self._places[path.name] = (path, None)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def content(self, name: str) -> bytes:
        """The bytes of a file."""
        if name not in self._places:
            raise InputError(f"{self._root}: has no {name}, neither unpacked nor in a zip archive")
        path, member = self._places[name]
        try:
            if member is None:
                return path.read_bytes()
            with zipfile.ZipFile(path) as archive:
                return archive.read(member)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: {name} cannot be read: {error}") from None

    def lines(self, name: str) -> list[str]:
        """The lines of a file, without blanks at their ends and without blank lines."""
        try:
            lines = self.content(name).decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: is not text: {error}") from None
        return [stripped for line in lines if (stripped := line.strip())]

    def _members(self, archive: Path) -> list[str]:
        try:
            with zipfile.ZipFile(archive) as file:
                return [name for name in file.namelist() if name.endswith(".txt")]
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{archive}: cannot be read: {error}") from None


def _paths(files: _Files, name: str) -> list[str]:
    return [line.replace("\\", "/") for line in files.lines(name)]


def _check_path(path: str) -> None:
    """These become names of files that are opened: nothing but what is distributed."""
    if path.startswith("/") or ".." in path.split("/"):
        raise InputError(f"Imagelist.txt: {path!r} leaves the folder of pictures")
    if not item_id(path).isdecimal():
        raise InputError(f"Imagelist.txt: {path!r} does not end with the number of an item")


class _ImageLists:
    """All images, and those of each official list.

    Raises:
        InputError: an image is named twice, in the list of a split alone, or as none is.
    """

    def __init__(self, files: _Files) -> None:
        self.paths = _paths(files, "Imagelist.txt")
        for path in self.paths:
            _check_path(path)
        row_of = {path: row for row, path in enumerate(self.paths)}
        if len(row_of) < len(self.paths):
            raise InputError("Imagelist.txt: names an image twice")
        self.rows: dict[str, Int[np.ndarray, " listed"]] = {}
        """Split -> its rows in `paths`, in the order of its own list."""
        named_in: dict[str, str] = {}
        for split, short in LISTS.items():
            name = f"{short}Imagelist.txt"
            listed = _paths(files, name)
            for path in listed:
                if path not in row_of:
                    raise InputError(f"{name}: {path} is not in Imagelist.txt")
                if path in named_in:
                    raise InputError(f"{name}: {path} is in {named_in[path]}, too")
                named_in[path] = name
            self.rows[split] = np.array([row_of[path] for path in listed], dtype=np.int64)


def _flags(
    files: _Files, whole: str, part: str, lists: _ImageLists, num_columns: int
) -> Bool[np.ndarray, "image column"]:
    """A table over all images: the file `whole`, or `part` for both lists.

    Raises:
        InputError: there is neither, or a file does not fit its list.
    """
    parts = {split: part.format(short) for split, short in LISTS.items()}
    if whole in files or not all(name in files for name in parts.values()):
        return _read_flags(files, whole, len(lists.paths), num_columns)
    if sum(map(len, lists.rows.values())) < len(lists.paths):
        names = " and ".join(parts.values())
        raise InputError(f"{names}: need every image in a list; use {whole}, which has them all")
    table = np.zeros((len(lists.paths), num_columns), dtype=bool)
    for split, rows in lists.rows.items():
        table[rows] = _read_flags(files, parts[split], len(rows), num_columns)
    return table


def _read_flags(
    files: _Files, name: str, num_lines: int, num_columns: int
) -> Bool[np.ndarray, "line column"]:
    """A table of 0 and 1 between blanks.

    Raises:
        InputError: another value, or other numbers of lines and columns.
    """
    content = files.content(name).replace(_BAD_VALUE, b"0")
    if content.translate(None, b"01 \t\r\n"):
        word = re.findall(rb"[^ \t\r\n]*[^01 \t\r\n][^ \t\r\n]*", content)[0]
        raise InputError(f"{name}: holds {word.decode('latin-1')!r:.40}, not only 0 and 1")
    rows = content.translate(None, b" \t\r").strip(b"\n") + b"\n"
    ends = slice(num_columns, None, num_columns + 1)
    is_value = np.frombuffer(content, dtype=np.uint8) > ord(" ")
    are_joined = np.any(is_value[1:] & is_value[:-1])
    # With blanks between all values, and lines that end there and nowhere else, no value can have
    # slipped into another place.
    if are_joined or rows[ends] != b"\n" * num_lines or rows.count(b"\n") != num_lines:
        raise InputError(
            f"{name}: must have {num_lines} lines of {num_columns} values, but has"
            f" {len(content.splitlines())} lines and {is_value.sum()} values"
        )
    table = np.frombuffer(rows, dtype=np.uint8).reshape(num_lines, num_columns + 1)
    return table[:, :-1] == ord("1")
