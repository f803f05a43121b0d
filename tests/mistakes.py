"""What goes wrong in the first ten minutes: commands as people type them, run in a scene of files.

`python tests/mistakes.py` runs them all and writes `docs/troubleshooting.md` anew.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import TINY
from warm import PATIENCE_S, REPOSITORY, end_shared, shared

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
TRAINERS = ("train_ls.py", "pretrain.py", "train_nuswide.py")


@dataclass(frozen=True)
class Mistake:
    """One row of the page."""

    what: str
    """What has gone wrong, in the reader's words."""
    command: str
    """As typed in the folder of the scene; PORT is one that is in use."""
    remedy: str = ""
    """What to do where the message, being somebody else's, does not say it."""
    line: str = "error: "
    """Regular expression that finds the message among the lines that are printed."""
    code: int | None = 2
    """Exit code; None: that of somebody else's program, not 0."""
    without_gpu: bool = False
    """Whether it is none where there is a GPU."""
    needs_mounts: bool = False
    """Whether it mounts file systems of its own."""

    @property
    def is_slow(self) -> bool:
        """Whether it starts a process that imports everything, or asks a server many times."""
        own = re.match(r"(\S+=\S+ )*python launchers/", self.command)
        return own is None or "http://" in self.command.removeprefix(own[0])


TRAIN = "python launchers/train_ls.py"
BUILD = "python launchers/shards.py build table --out made --table"

MISTAKES: dict[str, Sequence[Mistake]] = {
    "Installing and starting": [
        Mistake(
            "Python is too old",
            "python -m pip install --dry-run --no-deps --no-build-isolation --target new"
            " --python-version 3.10 --only-binary :all: .",
            "Make the virtual environment with Python 3.11 or newer. (The options stand for pip"
            " of Python 3.10.)",
            line="requires a different Python",
            code=None,
        ),
        Mistake(
            "the environment is not active",
            "python -I -S launchers/train_ls.py",
            "Activate the environment in which you installed; or install, see the README.",
            line="ModuleNotFoundError",
            code=None,
        ),
        Mistake(
            "several processes on a CPU with accelerate",
            "accelerate launch --cpu --num_processes 2 launchers/train_ls.py",
            code=None,
        ),
        Mistake(
            "no GPU, and a configuration of one",
            "accelerate launch --config_file configs/accelerate/gpu_1.yaml launchers/train_ls.py"
            " --data.path shards --output_dir new --max_steps 1",
            line="^warning: no GPU",
            code=0,
            without_gpu=True,
        ),
        Mistake(
            "the port is in use",
            "torchrun --nproc_per_node 2 --master_port PORT -- launchers/train_ls.py",
            "Another job has it: choose another `--master_port`, or `--standalone` on one machine.",
            line="EADDRINUSE",
            code=None,
        ),
        Mistake(
            "torchrun takes our --run for its own",
            "torchrun --nproc_per_node 1 launchers/evaluate.py --run run",
            "Write `--` before the launcher.",
            line="error: ",
            code=None,
        ),
        Mistake(
            "the port of TensorBoard is in use",
            "tensorboard --logdir run --port PORT",
            "Choose another `--port`.",
            line="already in use|could not bind",
            code=None,
        ),
    ],
    "Settings": [
        Mistake("a typo in an option", f"{TRAIN} --train.epoch 3"),
        Mistake("an option of no section", f"{TRAIN} --lr 0.1"),
        Mistake("a word for a number", f"{TRAIN} --train.epochs many"),
        Mistake("a number out of range", f"{TRAIN} --train.global_batch_size 0"),
        Mistake("a model that does not exist", f"{TRAIN} --model.kind transformer"),
        Mistake("no such configuration", f"{TRAIN} --config nowhere.yaml"),
        Mistake("YAML that cannot be read", f"{TRAIN} --config broken.yaml"),
        Mistake("a typo in YAML", f"{TRAIN} --config typo.yaml"),
        Mistake("a value of the wrong type in YAML", f"{TRAIN} --config type.yaml"),
        Mistake("fp16 without a GPU", f"{TRAIN} --train.precision fp16", without_gpu=True),
        Mistake(
            "decoding on a GPU without one", f"{TRAIN} --data.decoder dali_gpu", without_gpu=True
        ),
        Mistake(
            "ImageNet weights, offline",
            f"https_proxy=http://127.0.0.1:9 TORCH_HOME=empty {TRAIN} --output_dir new"
            " --data.path shards --model.backbone_weights imagenet",
        ),
        Mistake(
            "weights that are not there",
            f"{TRAIN} --output_dir new --data.path shards --model.backbone_weights nowhere.pth",
        ),
    ],
    "Data to train on": [
        Mistake("a path that does not exist", f"{TRAIN} --data.path nowhere"),
        Mistake("a folder of pictures, not a data set", f"{TRAIN} --data.path photos"),
        Mistake("a table, not a data set", f"{TRAIN} --data.path photos/photos.csv"),
        Mistake("a server that does not answer", f"{TRAIN} --data.path http://127.0.0.1:9/shards"),
        Mistake("tags without labels", f"{TRAIN} --data.path unlabelled"),
        Mistake("a data set that was copied in part", f"{TRAIN} --data.path partial"),
    ],
    "A table of your own": [
        Mistake("no such table", f"{BUILD} nowhere.csv"),
        Mistake("another kind of file", f"{BUILD} photos/photos.xlsx"),
        Mistake("a CSV without a header", f"{BUILD} photos/no_header.csv"),
        Mistake("columns of other names", f"{BUILD} photos/names.csv"),
        Mistake("semicolons between columns", f"{BUILD} photos/semicolons.csv"),
        Mistake("tags with commas that are not quoted", f"{BUILD} photos/commas.csv"),
        Mistake("not UTF-8", f"{BUILD} photos/latin1.csv"),
        Mistake("an empty table", f"{BUILD} photos/empty.csv"),
        Mistake("empty tag lists", f"{BUILD} photos/untagged.csv"),
        Mistake("pictures that are not there", f"{BUILD} photos/absent.csv"),
        Mistake(
            "a file that is no picture",
            f"{BUILD} photos/text.csv",
            "`skipped.jsonl` says which, and why.",
            line="skipped, see",
            code=0,
        ),
        Mistake("an important tag that is not among the tags", f"{BUILD} photos/foreign.csv"),
        Mistake("too few pictures to validate on", f"{TRAIN} --data.path one"),
        Mistake(
            "a folder that holds another data set",
            "python launchers/shards.py build demo --out mine",
        ),
        Mistake(
            "a data set of the hub, offline",
            "HF_HUB_OFFLINE=1 python launchers/shards.py build hf --out made --path nobody/nothing",
            "Where the network is, `load_dataset(...).save_to_disk(FOLDER)`; then `--path FOLDER`.",
        ),
    ],
    "Run folders": [
        Mistake(
            "a folder that cannot be written",
            f"{TRAIN} --data.path shards --output_dir /proc/runs",
        ),
        Mistake(
            "a file where the folder should be",
            f"{TRAIN} --data.path shards --output_dir photos/photos.csv",
        ),
        Mistake(
            "a checkpoint of another configuration",
            f"{TRAIN} --data.path shards --output_dir run --model.d_model 32",
        ),
        Mistake(
            "shards of another vocabulary",
            f"{TRAIN} --data.path mine --output_dir run --max_steps 4",
        ),
        Mistake("no checkpoint to go on from", f"{TRAIN} --data.path shards --resume nowhere"),
        Mistake(
            "weights from a folder without a run",
            f"{TRAIN} --data.path shards --output_dir new --init_from photos",
        ),
        Mistake(
            "the disk is full",
            "mount -t tmpfs -o size=300k tmpfs full && python launchers/train_ls.py"
            " --data.path shards --output_dir full/run --max_steps 2",
            needs_mounts=True,
        ),
        Mistake(
            "/dev/shm is too small, as in a container",
            "mount -t tmpfs -o size=1m tmpfs /dev/shm && python launchers/train_ls.py"
            " --data.path shards --output_dir new --data.num_workers 1 --augment.image_size 224",
            needs_mounts=True,
        ),
        Mistake("to score a run that is not there", "python launchers/evaluate.py --run nowhere"),
        Mistake(
            "to score on shards of another vocabulary",
            "python launchers/evaluate.py --run run --data.path mine",
        ),
        Mistake(
            "to predict for a folder without pictures",
            "python launchers/predict.py --run run --input run --out tags.jsonl",
        ),
        Mistake(
            "to export into a folder that is in use",
            "python launchers/export.py --run run --out photos",
        ),
    ],
}


# The scene --------------------------------------------------------------------------------------


def make_scene(folder: Path) -> None:
    """Files that people have, and files that they have got wrong."""
    from magneto_dist.data.sources import demo, table

    for name in ("launchers", "configs", "magneto_dist", "pyproject.toml", "README.md", "LICENSE"):
        (folder / name).symlink_to(REPOSITORY / name)
    for name in ("empty", "full"):
        (folder / name).mkdir()
    demo.build(folder / "shards", items=60, num_processes=1)
    _make_tables(folder / "photos", folder / "shards")
    photos = folder / "photos/photos.csv"
    table.build(folder / "mine", photos, validation_fraction=0.5)
    table.build(folder / "one", folder / "photos/one.csv")
    unlabelled = table.TableColumns(important=None)
    table.build(folder / "unlabelled", photos, columns=unlabelled, validation_fraction=0.5)
    shutil.copytree(folder / "shards", folder / "partial")
    (folder / "partial/train-000000.tar").unlink()
    (folder / "broken.yaml").write_text("train:\n  epochs: [3\n")
    (folder / "typo.yaml").write_text("train:\n  epoch: 3\n")
    (folder / "type.yaml").write_text("train:\n  epochs: three\n")
    options = [*TINY, "--data.path=shards", "--output_dir=run", "--max_steps=2"]
    shared().run("train_ls.py", *options, cwd=folder)


def _make_tables(photos: Path, shards: Path) -> None:
    """Eight pictures of the demo, a good table of them, and bad ones."""
    photos.mkdir()
    with tarfile.open(shards / "train-000000.tar") as tar:
        jpegs = [member for member in tar if member.name.endswith(".jpg")][:8]
        for number, member in enumerate(jpegs):
            content = tar.extractfile(member)
            assert content
            (photos / f"{number}.jpg").write_bytes(content.read())
    (photos / "notes.jpg").write_text("no picture")
    names = [f"{number}.jpg" for number in range(8)]
    header = ["file_name", "tags", "important_tags"]
    good = [[name, "mer,chien,été", "mer"] for name in names]

    def write(name: str, rows: Sequence[Sequence[str]], **dialect: str) -> None:
        with (photos / name).open("w", newline="", encoding=dialect.pop("encoding", "utf-8")) as to:
            csv.writer(to, **dialect).writerows(rows)  # type: ignore[arg-type]

    write("photos.csv", [header, *good])
    write("photos.xlsx", [header, *good])
    write("no_header.csv", good)
    write("names.csv", [["path", "keywords", "main"], *good])
    write("semicolons.csv", [header, *good], delimiter=";")
    write("latin1.csv", [header, *good], encoding="latin-1")
    write("empty.csv", [header])
    write("untagged.csv", [header, *([name, "", ""] for name in names)])
    write("absent.csv", [header, *([f"x{name}", *rest] for name, *rest in good)])
    write("text.csv", [header, *good, ["notes.jpg", "mer", "mer"]])
    write("foreign.csv", [header, *good, ["0.jpg", "mer", "lac"]])
    write("one.csv", [header, good[0]])
    (photos / "commas.csv").write_text(
        "\n".join([",".join(header), *(f"{name},mer,chien,été,mer" for name in names)]) + "\n"
    )


# Running ----------------------------------------------------------------------------------------


def printed_by(mistake: Mistake, scene: Path) -> str:
    """The message that it gives: one line, with nothing in it that differs between machines."""
    with _port_in_use() as port:
        command = mistake.command.replace("PORT", str(port))
        code, output = _run(command, mistake, scene)
        output = output.replace(str(port), "PORT")
    for name in ("new", "made"):
        shutil.rmtree(scene / name, ignore_errors=True)
    assert code == mistake.code if mistake.code is not None else code != 0, f"{code}: {output}"
    found = [line for line in output.splitlines() if re.search(mistake.line, line)]
    assert found, output
    return neutral(found[0], scene)


def neutral(line: str, scene: Path) -> str:
    """Without folders, versions, process ids and times of this machine."""
    line = line.replace(f"{scene}/", "").replace(str(scene), ".").strip()
    line = re.sub(r"\x1b\[[0-9;]*m|^E\d{4} .*?\] ", "", line)  # colours, the head of a log line
    line = re.sub(r"</torch_\w+>", "</torch_N>", line)
    return re.sub(r"\d+\.\d+ GB", "N GB", line)


def _run(command: str, mistake: Mistake, scene: Path) -> tuple[int, str]:
    words = shlex.split(command)
    settings = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    if words[0] == "python" and words[1].startswith("launchers/"):
        launcher = words[1].removeprefix("launchers/")
        options = [*(TINY if launcher in TRAINERS else []), *words[2:]]
        launched = shared().start(launcher, *options, environment=settings, cwd=scene)
        return launched.wait(PATIENCE_S), launched.output
    shell = ["bash", "-c", command.replace("train_ls.py ", f"train_ls.py {shlex.join(TINY)} ")]
    if mistake.needs_mounts:
        shell = ["unshare", "--map-root-user", "--mount", *shell]
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {"PATH": scripts, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **ours}
    ended = subprocess.run(
        shell, cwd=scene, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE_S,
    )  # fmt: skip
    return ended.returncode, ended.stdout


@contextmanager
def _port_in_use() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


# The page ---------------------------------------------------------------------------------------

_HEAD = """\
# Troubleshooting

`python -m magneto_dist.doctor` looks at the machine first. Below is what is printed when something
is not as it should be: each line was made by running the command, and a test fails where one is no
longer what is printed (options that make the model a small one are left out). `accelerate launch`
and `torchrun` print a traceback of their own below the line; look for `error:` between two rules.
Several nodes: [multi-node](multi_node.md#when-it-does-not-work).
"""


def row(mistake: Mistake, message: str) -> str:
    """A row of the page's tables."""
    remedy = f"<br>{mistake.remedy}" if mistake.remedy else ""
    return f"| {mistake.what}<br>{_code(mistake.command)} | {_code(message)}{remedy} |"


def _code(text: str) -> str:
    """Text as it is, in a cell of a table."""
    ticks = "``" if "`" in text else "`"
    padding = " " if "`" in text else ""
    return f"{ticks}{padding}{text}{padding}{ticks}".replace("|", "\\|")


def write_page(scene: Path) -> None:
    """Runs everything, and writes the page."""
    parts = [_HEAD]
    for title, mistakes in MISTAKES.items():
        parts.append(f"\n## {title}\n\n| what happened | what is printed |\n|---|---|\n")
        parts += [f"{row(mistake, printed_by(mistake, scene))}\n" for mistake in mistakes]
    PAGE.write_text("".join(parts), encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="scene-") as folder:
        make_scene(Path(folder))
        write_page(Path(folder))
    end_shared()
