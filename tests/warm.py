"""Launchers as real processes that need not import anything: forked from one that has it all.

Tests that start hundreds of runs cannot pay for as many imports. `Warm` starts a process that
imports torch and this package and computes nothing; each launch is a fork of it, with one thread,
its own address space, signals and exit code, as a freshly started one has.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).parent.parent
PATIENCE_S = 400.0
"""For whatever takes seconds: how long it takes is a property of the machine, not of the code."""


_SHARED: list[Warm] = []


@dataclass
class Forked:
    """A launcher that runs, or has run; what tests do with a `Popen` can be done with it."""

    warm: Warm
    pid: int
    output_path: Path
    """Where its stdout goes, and its stderr unless asked otherwise."""
    returncode: int | None = None
    """Set when it was waited for; negative where a signal ended it."""

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.output_path.read_text(errors="replace")

    @property
    def errors(self) -> str:
        """Its stderr so far, where that was asked for alone."""
        return self.output_path.with_suffix(".err").read_text(errors="replace")

    @property
    def has_ended(self) -> bool:
        """Whether it has, though nobody may have waited for it."""
        if self.returncode is not None:
            return True
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        return self.wait() if self.has_ended else None

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """Waits for its end, for so many seconds."""
        if self.returncode is None:
            self.returncode = self.warm.wait(self, timeout)
        return self.returncode

    def communicate(self, timeout: float = PATIENCE_S) -> tuple[str, None]:
        """Waits for its end; what it has printed."""
        self.wait(timeout)
        return self.output, None

    def send_signal(self, number: signal.Signals) -> None:
        """Sends it a signal. The process that forked it keeps its number until `wait`."""
        os.kill(self.pid, number)


@dataclass
class ForkedRanks:
    """All ranks of a launcher; what tests do with one process can be done with them."""

    ranks: list[Forked]

    @property
    def returncode(self) -> int | None:
        """0 if all have ended well, else how one did not."""
        codes = [rank.returncode for rank in self.ranks]
        return next(filter(None, codes), codes[0])

    def poll(self) -> int | None:
        """Its exit code, if all have ended."""
        if None in [rank.poll() for rank in self.ranks]:
            return None
        return self.returncode

    def communicate(self, timeout: float = PATIENCE_S) -> tuple[str, None]:
        """Waits for their end; what they have printed, rank by rank."""
        return "\n".join(rank.communicate(timeout)[0] for rank in self.ranks), None

    @property
    def pid(self) -> int:
        """Process id of rank 0."""
        return self.ranks[0].pid

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal to all that have not been waited for."""
        for rank in self.ranks:
            if rank.returncode is None:
                rank.send_signal(number)

    def kill(self) -> None:
        """Sends all SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Warm:
    """Client of a process with everything imported; a context manager.

    Args:
        folder: for what launchers print.
        modules: imported besides `magneto_dist.recipe`.
    """

    def __init__(self, folder: Path, *modules: str) -> None:
        self.folder, self._num_launches = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(REPOSITORY), str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
        )
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._ask({}) == "ready"

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def start(
        self,
        launcher: str,
        *options: str,
        environment: Mapping[str, str] | None = None,
        forwards: Path | None = None,
        cwd: Path | None = None,
        largest_file_bytes: int | None = None,
        separate_errors: bool = False,
    ) -> Forked:
        """Starts a launcher.

        Args:
            launcher: its file's name.
            options: its command line.
            environment: variables that it finds besides ours.
            forwards: file to which it writes a line for each training forward of the model.
            cwd: where it is started.
            largest_file_bytes: files that would grow over it meet an error, as on a full disk.
            separate_errors: whether its stderr goes to a file of its own.
        """
        self._num_launches += 1
        output = self.folder / f"launch-{self._num_launches:04d}.txt"
        request = {
            "launcher": str(REPOSITORY / "launchers" / launcher),
            "options": options,
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            "output": str(output),
            "errors": str(output.with_suffix(".err")) if separate_errors else None,
            "forwards": forwards and str(forwards),
            "cwd": str(cwd or Path.cwd()),
            "largest_file_bytes": largest_file_bytes,
        }
        return Forked(self, self._ask(request), output)

    def wait(self, launched: Forked, timeout_s: float = PATIENCE_S) -> int:
        """Waits for its end; returns its exit code, negative where a signal ended it."""
        code = self._ask({"wait": launched.pid, "timeout_s": timeout_s})
        assert code is not None, f"still running after {timeout_s} s: {launched.output}"
        return code

    def start_ranks(
        self,
        launcher: str,
        *options: str,
        ranks: int,
        environment: Mapping[str, str] | None = None,
        forwards: Path | None = None,
        **more: Any,
    ) -> ForkedRanks:
        """As `start`, on `ranks` processes; `forwards` is a folder, `N.jsonl` for rank N."""
        return ForkedRanks(
            [
                self.start(
                    launcher,
                    *options,
                    environment={**place, **(environment or {})},
                    forwards=forwards and forwards / f"{rank}.jsonl",
                    **more,
                )
                for rank, place in enumerate(places(ranks))
            ]
        )

    def run(self, launcher: str, *options: str, ranks: int = 1, **more: Any) -> str:
        """As `start_ranks`, to its end, which must be a good one; what they printed."""
        started = self.start_ranks(launcher, *options, ranks=ranks, **more)
        output, _ = started.communicate()
        assert started.returncode == 0, output
        return output

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        reply = self._process.stdout.readline()
        assert reply, f"the process that forks launchers ended with {self._process.wait(60)}"
        return json.loads(reply)


def shared() -> Warm:
    """The one that all tests of this process fork from."""
    if not _SHARED:
        _SHARED.append(Warm(Path(tempfile.mkdtemp(prefix="launched-"))))
    return _SHARED[0]


def end_shared() -> None:
    """Ends it, if there is one, and forgets what was printed."""
    for each in _SHARED:
        each.__exit__()
        shutil.rmtree(each.folder)
    _SHARED.clear()


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def places(ranks: int) -> Sequence[dict[str, str]]:
    """What torchrun tells each of `ranks` processes of one node; nothing where there is one."""
    if ranks == 1:
        return [{}]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**meeting, **size, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]


def forwards_of(path: Path) -> list[dict[str, str]]:
    """What a launcher wrote to its `forwards`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _serve() -> None:
    for module in ("magneto_dist.recipe", *sys.argv[1:]):
        importlib.import_module(module)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "threads do not survive a fork"
    gc.freeze()  # a launch need not look through all that was imported
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "wait" in request:
            reply = _wait(request["wait"], request["timeout_s"])
        elif "launcher" in request:
            reply = os.fork()
            if reply == 0:
                _become(request)
        else:
            reply = "ready"
        print(json.dumps(reply), flush=True)


def _wait(pid: int, timeout_s: float) -> int | None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def _become(request: Mapping[str, Any]) -> NoReturn:
    """Makes this fork the launcher; what it exits with ends the process."""
    output, errors = (
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for path in (request["output"], request["errors"] or request["output"])
    )
    for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, errors)):
        os.dup2(target, stream)
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    if limit := request["largest_file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = [request["launcher"], *request["options"]]
    sys.path[0] = str(Path(request["launcher"]).parent)
    if request["forwards"]:
        _record_forwards(Path(request["forwards"]))
    runpy.run_path(request["launcher"], run_name="__main__")
    sys.exit("a launcher ends by itself")


def _record_forwards(path: Path) -> None:
    """Has torch write hashes of what the model is given, what it gives, and the random state."""
    import torch

    from magneto_dist.model.magneto import MAGNeto

    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", buffering=1)

    def digest(tensors: Sequence[torch.Tensor | None]) -> str:
        sha = hashlib.sha256()
        for tensor in tensors:
            sha.update(b"-" if tensor is None else tensor.detach().cpu().numpy().tobytes())
        return sha.hexdigest()

    def note(module: Any, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        if isinstance(module, MAGNeto) and module.training:
            seen = {
                "inputs": digest([*args, *kwargs.values()]),
                "outputs": digest([output.image_logits, output.tag_logits, output.gate_logits]),
                "random_state": digest([torch.get_rng_state()]),
            }
            file.write(json.dumps(seen) + "\n")

    torch.nn.modules.module.register_module_forward_hook(note, with_kwargs=True)


if __name__ == "__main__":
    _serve()
