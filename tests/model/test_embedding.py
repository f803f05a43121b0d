"""Word vectors as a start of the tag embedding."""

from pathlib import Path

import pytest
import torch

from magneto_dist.config import ModelConfig
from magneto_dist.errors import InputError
from magneto_dist.model.embedding import load_tag_embedding
from magneto_dist.model.magneto import build_model
from magneto_dist.vocabulary import Vocabulary

CONFIG = ModelConfig(kind="ff", d_model=2, num_heads=1, d_ff=4, tag_layers=1)
VECTORS = """sun 1 2
new_york 3 4
paris 5 6
red 1 0
wine 0 1
San-Diego 7 8
. . 9 9
sun 0 0
"""


def write(folder: Path, content: str) -> Path:
    path = folder / "vectors.txt"
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("header", ["", "8 2\n"], ids=["GloVe", "word2vec"])
def test_tags_take_their_best_vector(tmp_path: Path, header: str) -> None:
    tags = ["sun", "New York", "Paris", "red wine", "san diego", "unknown", "dry wine", "red"]
    torch.manual_seed(0)
    model = build_model(CONFIG, len(tags))
    before = model.tag_embedding.vectors.weight.detach().clone()
    coverage = load_tag_embedding(model, Vocabulary(tags), write(tmp_path, header + VECTORS))
    after = model.tag_embedding.vectors.weight.detach()
    assert coverage == 7 / 8
    assert after[:5].tolist() == [[1, 2], [3, 4], [5, 6], [0.5, 0.5], [7, 8]]
    assert torch.equal(after[5], before[5])
    assert after[6:8].tolist() == [[0, 1], [1, 0]]
    assert not after[8].any(), "padding stays zero"
    assert after.requires_grad is False
    assert model.tag_embedding.vectors.weight.requires_grad


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("3 5\nsun 1 2 3 4 5\n", "its vectors have 5 numbers, --model.d_model is 2"),
        ("sun 1 2 3\n", "its vectors have 3 numbers"),
        ("moon 1 2\nsun 1 x\n", "line 2 holds no vector"),
        ("moon 1 2\nsun 1 nan\n", "line 2 holds no vector"),
        ("moon 1 2\nsun 1\n", "line 2 is cut short"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_tag_embedding(build_model(CONFIG, 1), Vocabulary(["sun"]), write(tmp_path, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.txt: no such file"):
        load_tag_embedding(build_model(CONFIG, 1), Vocabulary(["sun"]), tmp_path / "absent.txt")
