"""What is done with a trained run: scored, applied, looked at, handed on. Real processes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

from magneto_dist import export
from magneto_dist.data.items import ShardItems
from magneto_dist.data.shards import Dataset
from magneto_dist.decision import Decision
from magneto_dist.errors import InputError
from magneto_dist.hub import load_exported
from magneto_dist.trained_run import load_run
from processes import TINY, damage_picture, refused, run, summary
from warm import REPOSITORY

NUM_ITEMS = 22  # of the validation split


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# evaluate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_gives_the_numbers_of_training_on_any_number_of_ranks(run_dir, tmp_path, ranks):
    out = tmp_path / "scores.json"
    printed = run("evaluate.py", "--run", str(run_dir), "--out", str(out), ranks=ranks)
    assert "gated output" in printed
    scores = json.loads(out.read_text())
    assert scores["world_size"] == max(ranks, 1)
    assert (scores["items"], scores["items_not_scored"]) == (NUM_ITEMS, 0)
    ours, theirs = scores["validation"], summary(run_dir)["validation"]
    assert ours.keys() == theirs.keys()
    for head in ("final", "image", "tag"):
        for protocol in ("paper", "strict"):
            assert ours[head][protocol] == pytest.approx(theirs[head][protocol], rel=1e-6)


def test_evaluation_refuses_another_vocabulary(run_dir, demo_shards, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(demo_shards, other)
    tags = (other / "vocabulary.txt").read_text().splitlines()
    (other / "vocabulary.txt").write_text("\n".join([*tags[:-1], "another", ""]))
    error = refused("evaluate.py", "--run", str(run_dir), "--data.path", str(other))
    assert "vocabulary" in error


def test_a_folder_without_a_run_is_refused(tmp_path):
    for launcher, more in (("evaluate.py", ()), ("export.py", ("--out", str(tmp_path / "o")))):
        assert "no run there" in refused(launcher, "--run", str(tmp_path), *more)


# export -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "für alle"
    printed = run("export.py", "--run", str(run_dir), "--out", str(out), "--onnx", "--pt2",
                  "--threshold", "0.375")  # fmt: skip
    for runtime in ("onnx", "pt2"):
        (difference,) = re.findall(
            rf"model.{runtime}: probabilities of 22 items differ by at most (\S+) from", printed
        )
        assert float(difference) < 1e-5
    return out


def test_exported_model_gives_the_same_bits(run_dir, exported):
    out = exported
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "model.onnx", "model.pt2", "model.safetensors",
        "vocabulary.txt",
    ]  # fmt: skip
    ours, theirs = load_exported(out), load_run(run_dir)
    assert ours.vocabulary.tags == theirs.vocabulary.tags
    ids = torch.arange(10).reshape(2, 5)
    mask = ids < 8
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        left, right = ours.model(ids, mask, pixels), theirs.model(ids, mask, pixels)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "magneto" in card
    assert "`model.onnx`: off by at most" in card
    assert str(run_dir) not in card + (out / "config.json").read_text(encoding="utf-8")


def test_files_for_other_runtimes_say_from_which_probability_a_tag_is_predicted(exported):
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    extra = {export.METADATA: ""}
    torch.export.load(exported / "model.pt2", extra_files=extra)
    for text in (session.get_modelmeta().custom_metadata_map[export.METADATA], *extra.values()):
        assert Decision.from_json(json.loads(text)) == Decision(0.375)
    assert load_exported(exported).decision == Decision(0.375)
    assert "from probability 0.375 on.\n" in (exported / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("items", "slots"), [(1, 1), (1, 12), (3, 1), (9, 40)])
def test_exported_model_takes_any_number_of_items_and_tags(run_dir, exported, items, slots):
    network = load_run(run_dir).model
    generator = torch.Generator().manual_seed(items)
    num_tags = network.tag_embedding.vectors.padding_idx
    mask = torch.arange(slots) < torch.randint(slots + 1, (items, 1), generator=generator)
    inputs = {
        "tag_ids": torch.randint(num_tags, mask.shape, generator=generator).where(mask, num_tags),
        "tag_mask": mask,
        "pixels": torch.randint(256, (items, 3, 32, 32), generator=generator, dtype=torch.uint8),
    }
    with torch.no_grad():
        prediction = network(**inputs)
        pt2 = torch.export.load(exported / "model.pt2").module()(**inputs)
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    assert [node.shape[:2] for node in session.get_inputs()][:2] == [["batch", "slot"]] * 2
    names = [node.name for node in session.get_outputs()]
    assert names == ["probability", "image", "tag", "alpha"]
    got = dict(
        zip(names, session.run(names, {k: v.numpy() for k, v in inputs.items()}), strict=True)
    )
    for name, head in (("probability", "final"), ("image", "image"), ("tag", "tag")):
        expected = prediction.probability(head)
        torch.testing.assert_close(pt2[name], expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.from_numpy(got[name]), expected, atol=1e-6, rtol=0)


def test_an_export_that_differs_is_refused(run_dir, demo_shards, tmp_path, monkeypatch):
    trained = load_run(run_dir)
    items = ShardItems(Dataset.open(str(demo_shards)), "validation", True)

    def write_wrong(graph, path, decision):
        name = "network.tag_head.bias"
        graph.state_dict[name] = torch.nn.Parameter(graph.state_dict[name] + 1)
        return export.write_pt2(graph, path, decision)

    monkeypatch.setitem(export._WRITERS, "pt2", write_wrong)
    with pytest.raises(InputError, match=r"--pt2: probabilities differ by 0\.\d+ from"):
        export.export_run(trained, tmp_path / "out", ["pt2"], items)
    assert list(tmp_path.iterdir()) == []


def test_an_export_needs_items_to_be_compared_on(run_dir, tmp_path):
    (tmp_path / "items.csv").write_text("file_name,tags\na.jpg,nobody knows this\n")
    error = refused("export.py", "--run", str(run_dir), "--out", str(tmp_path / "out"), "--pt2",
                    "--check", str(tmp_path / "items.csv"))  # fmt: skip
    assert "none of 1 items" in error
    assert "--check" in error
    assert not (tmp_path / "out").exists()


def test_export_overwrites_nothing(run_dir, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    assert "not empty" in refused("export.py", "--run", str(run_dir), "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("damage", ["config.json", "vocabulary.txt", "model.safetensors"])
def test_damaged_export_is_refused(exported, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    content = (out / damage).read_bytes()
    (out / damage).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=re.escape(damage)):
        load_exported(out)


# Tags alone -------------------------------------------------------------------------------------


def test_a_model_of_tags_alone_does_everything_and_minds_no_broken_picture(demo_shards, tmp_path):
    data, run_dir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(demo_shards, data)
    for shard in ("train-000000", "validation-000000"):
        for row in range(3):
            damage_picture(data, shard, row)
    run("train_ls.py", *TINY, f"--data.path={data}", f"--output_dir={run_dir}", "--max_steps=6",
        "--model.kind=tf-t", "--log.tensorboard=true", "--data.ledger=true")  # fmt: skip
    assert len(lines(run_dir / "ledger" / "rank-00000.jsonl")) == 90
    assert (run_dir / "quarantine" / "rank-00000.jsonl").read_text() == ""
    assert summary(run_dir)["validation"]["items"] == NUM_ITEMS

    scores, items, out = tmp_path / "scores.json", tmp_path / "items.jsonl", tmp_path / "out"
    run("evaluate.py", "--run", str(run_dir), "--out", str(scores))
    scored = json.loads(scores.read_text())
    assert (scored["items"], scored["items_not_scored"]) == (NUM_ITEMS, 0)
    run("predict.py", "--run", str(run_dir), "--input", str(data), "--out", str(items),
        "--num_workers", "0", "--html", str(tmp_path / "page.html"))  # fmt: skip
    assert [item for item in lines(items) if "error" in item] == []
    run("export.py", "--run", str(run_dir), "--out", str(out))
    assert load_exported(out).config.model.kind == "tf-t"


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", sorted(p.name for p in (REPOSITORY / "launchers").glob("*.py"))
)
def test_every_launcher_starts_in_a_process_of_its_own(launcher: str) -> None:
    assert "usage: " in run(launcher, "--help", through=[sys.executable])
