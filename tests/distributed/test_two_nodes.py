"""Two machines on one: network namespaces that a pair of virtual Ethernet devices joins."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from processes import TINY, launch_through, losses, status, wait_for_step
from warm import PATIENCE_S, Warm

STEPS = 14
PORT = 29400  # in namespaces of their own

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Node:
    """A network namespace, and the device and address by which the other node reaches it."""

    name: str
    address: str
    device: str = "node0"

    def torchrun(self, first: Node) -> list[str]:
        """The process launcher of this node; `first` holds the rendezvous."""
        return [
            *("ip", "netns", "exec", self.name),
            *("env", f"GLOO_SOCKET_IFNAME={self.device}"),
            # Else the node that stays does not tell the one that comes where to meet.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--monitor-interval=0.5"),
            *("--rdzv_id=test", "--rdzv_backend=c10d", f"--rdzv_endpoint={first.address}:{PORT}"),
            # Host names lead elsewhere: both nodes have the same one.
            *(f"--local_addr={self.address}", f"--rdzv_conf=is_host={int(self == first)}"),
            "--",
        ]

    def kill(self) -> None:
        """Ends every process of the node at once, as a power cut does."""
        for pid in ip("netns", "pids", self.name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    pair = tuple(Node(f"magneto-{os.getpid()}-{k}", f"10.231.0.{k + 1}") for k in (0, 1))
    with ExitStack() as undo:
        for node in pair:
            try:
                ip("netns", "add", node.name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
            undo.callback(ip, "netns", "del", node.name)
            undo.callback(node.kill)
        first, second = pair
        ip(
            *("link", "add", first.device, "netns", first.name, "type", "veth"),
            *("peer", "name", second.device, "netns", second.name),
        )
        for node in pair:
            ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.device)
            for device in ("lo", node.device):
                ip("-n", node.name, "link", "set", device, "up")
        yield first, second


@pytest.fixture(scope="module")
def one_node(warm: Warm, demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes of one node."""
    run_dir = tmp_path_factory.mktemp("runs") / "one-node"
    warm.run("train_ls.py", *options(demo_shards, run_dir), ranks=2)
    return run_dir


def options(data: Path, run_dir: Path) -> list[str]:
    every = ["--checkpoint.every_steps=4", f"--max_steps={STEPS}", "--data.ledger=true"]
    return [*TINY, *every, f"--data.path={data}", f"--output_dir={run_dir}"]


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, output


def assert_same_run(run_dir: Path, other: Path) -> None:
    assert status(run_dir)["state"] == "done"
    assert losses(run_dir) == losses(other)
    for file in ("ledger/rank-00001.jsonl", f"checkpoints/step-{STEPS:08d}/model.safetensors"):
        assert (run_dir / file).read_bytes() == (other / file).read_bytes()


def test_two_nodes_train_as_one(
    nodes: tuple[Node, Node], demo_shards: Path, one_node: Path, tmp_path: Path
) -> None:
    command = ("train_ls.py", *options(demo_shards, tmp_path))
    end(*[launch_through(node.torchrun(nodes[0]), *command) for node in nodes])
    assert_same_run(tmp_path, one_node)


def test_a_node_that_dies_and_comes_back_goes_on_from_the_checkpoint(
    nodes: tuple[Node, Node], demo_shards: Path, one_node: Path, tmp_path: Path
) -> None:
    command = ("train_ls.py", *options(demo_shards, tmp_path))
    first, second = (launch_through(node.torchrun(nodes[0]), *command) for node in nodes)
    wait_for_step(first, tmp_path, 6)
    nodes[1].kill()
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    end(first, launch_through(nodes[1].torchrun(nodes[0]), *command))
    assert_same_run(tmp_path, one_node)
