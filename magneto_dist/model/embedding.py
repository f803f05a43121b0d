"""Starts the tag embedding from word2vec or GloVe vectors (paper, section 3.1).

1. Every tag of the vocabulary names the words of the file that it could use.
2. One pass over the file keeps the vectors of these words.
3. Every tag takes its best vector; tags without one keep their random start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from magneto_dist.errors import InputError
from magneto_dist.model.tag_stream import TagEmbedding
from magneto_dist.vocabulary import Vocabulary

Vector = NDArray[np.float32]


def load_tag_embedding(model: nn.Module, vocabulary: Vocabulary, path: Path | str) -> float:
    """Overwrites the vectors of all tags that `path` knows, in the embedding of `model`.

    A tag is looked up as it is written; then with underscores, hyphens or nothing between its
    words; each also in lower case, then capitalised. A tag of several words that is in the file
    under none of these takes the mean of its words, as far as they are there. Tags without any
    vector keep their random start.

    Args:
        model: made by `build_model`, of any kind; not yet wrapped for training.
        vocabulary: the tags in the order of the embedding's rows.
        path: text file of word2vec (with its first line `count dimensions`) or GloVe (without).

    Returns:
        Fraction of the tags that took a vector, in [0, 1].

    Raises:
        InputError: no such file, other dimensions than the model's, or a line that is no vector.
    """
    embedding = next(m for m in model.modules() if isinstance(m, TagEmbedding)).vectors
    spellings = [_spellings(tag) for tag in vocabulary.tags]
    words = [_words(tag) for tag in vocabulary.tags]
    wanted = {name for names in spellings for name in names}
    wanted |= {name for tag in words for word in tag for name in _spellings(word)}
    known = _read_vectors(Path(path), wanted, embedding.embedding_dim)
    num_covered = 0
    for tag_id, (names, parts) in enumerate(zip(spellings, words, strict=True)):
        vector = _best_vector(names, parts, known)
        if vector is not None:
            with torch.no_grad():
                embedding.weight[tag_id] = torch.from_numpy(vector)
            num_covered += 1
    return num_covered / max(len(vocabulary), 1)


def _words(tag: str) -> list[str]:
    return [word for word in re.split(r"[\s_-]+", tag) if word]


def _spellings(tag: str) -> list[str]:
    """Ways to write a tag in a file of word vectors, the best first."""
    joined = [tag, *(separator.join(_words(tag)) for separator in ("_", "-", ""))]
    cased = [*joined, *(name.lower() for name in joined), *(name.title() for name in joined)]
    return list(dict.fromkeys(name for name in cased if name))


def _best_vector(names: list[str], words: list[str], known: dict[str, Vector]) -> Vector | None:
    found = next((known[name] for name in names if name in known), None)
    if found is not None or len(words) < 2:
        return found
    parts = [_best_vector(_spellings(word), [], known) for word in words]
    present = [part for part in parts if part is not None]
    return np.stack(present).mean(axis=0) if present else None


def _read_vectors(path: Path, wanted: set[str], dimensions: int) -> dict[str, Vector]:
    if not path.is_file():
        raise InputError(f"--model.tag_embedding_init {path}: no such file")
    known: dict[str, Vector] = {}
    for number, word, values in _lines(path, dimensions):
        if word not in wanted or word in known:
            continue
        try:
            vector = np.array(values, dtype=np.float32)
        except ValueError:
            vector = np.array([np.nan], dtype=np.float32)
        if not np.isfinite(vector).all():
            raise InputError(f"--model.tag_embedding_init {path}: line {number} holds no vector")
        known[word] = vector
    return known


def _lines(path: Path, dimensions: int) -> Iterator[tuple[int, str, list[str]]]:
    """Line number from 1, word, numbers as text; a word of GloVe may contain spaces."""
    # Files in the field hold a few broken characters; such a word is one that no tag asks for.
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            fields = line.rstrip().split(" ")
            if number == 1:
                is_header = len(fields) == 2 and all(field.isdigit() for field in fields)
                given = int(fields[1]) if is_header else len(fields) - 1
                if given != dimensions:
                    raise InputError(
                        f"--model.tag_embedding_init {path}: its vectors have {given} numbers,"
                        f" --model.d_model is {dimensions}"
                    )
                if is_header:
                    continue
            if len(fields) > dimensions:
                yield number, " ".join(fields[:-dimensions]), fields[-dimensions:]
            elif line.strip():
                raise InputError(f"--model.tag_embedding_init {path}: line {number} is cut short")
