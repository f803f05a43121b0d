from __future__ import annotations

from magneto_dist.batch import Reject
from magneto_dist.data.ledger import Ledger, Quarantine
from small_data import read_jsonl


def write(quarantine: Quarantine, step: int, key: str) -> None:
    quarantine.write(
        split="train", epoch=0, step=step, reject=Reject(key, "train-000000.tar", "broken")
    )


def keys_in(*quarantines: Quarantine) -> list[str]:
    return [entry["key"] for quarantine in quarantines for entry in read_jsonl(quarantine.path)]


def test_a_bad_sample_is_quarantined_once_a_run_also_after_a_restart(tmp_path):
    path = tmp_path / "quarantine" / "rank-00000.jsonl"
    quarantine = Quarantine(path)
    for step, key in ((1, "a"), (2, "b"), (3, "a"), (5, "c"), (6, "b")):
        write(quarantine, step, key)
    quarantine.flush()
    assert read_jsonl(path)[0] == {
        "epoch": 0,
        "step": 1,
        "split": "train",
        "key": "a",
        "shard": "train-000000.tar",
        "reason": "broken",
    }
    assert (keys_in(quarantine), quarantine.num_keys.total()) == (["a", "b", "c"], 3)
    quarantine.close()

    quarantine = Quarantine(path)
    assert quarantine.num_keys == {"train": 3}
    quarantine.cut_back(4)
    assert (keys_in(quarantine), quarantine.num_keys.total()) == (["a", "b"], 2)
    for key in ("b", "c", "d"):
        write(quarantine, 5, key)
    assert keys_in(quarantine) == ["a", "b", "c", "d"]
    quarantine.close()


def test_a_bad_sample_is_quarantined_once_over_all_ranks(tmp_path):
    ranks = [Quarantine(tmp_path / f"rank-{rank:05}.jsonl") for rank in range(3)]
    write(ranks[0], 1, "a")
    write(ranks[1], 1, "b")
    write(ranks[2], 3, "a")
    write(ranks[2], 3, "c")
    write(ranks[0], 4, "b")
    write(ranks[1], 4, "c")
    write(ranks[1], 4, "a")
    assert sorted(keys_in(*ranks)) == ["a", "b", "c"]
    assert max(quarantine.num_keys.total() for quarantine in ranks) == 3
    for quarantine in ranks:
        quarantine.close()


def test_what_another_rank_cut_back_is_quarantined_again(tmp_path):
    ranks = [Quarantine(tmp_path / f"rank-{rank:05}.jsonl") for rank in range(2)]
    write(ranks[0], 9, "a")
    for quarantine in ranks[::-1]:  # the other one opens first
        quarantine.cut_back(8)
    write(ranks[1], 9, "a")
    assert keys_in(*ranks) == ["a"]
    for quarantine in ranks:
        quarantine.close()


def test_the_ledger_holds_a_line_for_each_trained_sample(tmp_path):
    path = tmp_path / "ledger" / "rank-00000.jsonl"
    ledger = Ledger(path)
    ledger.write(epoch=0, step=1, keys=["a", "b"])
    ledger.write(epoch=0, step=2, keys=[])
    ledger.write(epoch=1, step=3, keys=["a"])
    ledger.flush()
    ledger.cut_back(2)
    ledger.write(epoch=1, step=3, keys=["b"])
    ledger.close()
    assert read_jsonl(path) == [
        {"epoch": 0, "step": 1, "key": "a"},
        {"epoch": 0, "step": 1, "key": "b"},
        {"epoch": 1, "step": 3, "key": "b"},
    ]
