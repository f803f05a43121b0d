"""What can be looked up without trying anything: packages, disk, memory, limits, network.

Imports nothing that may be missing or broken but where it is used, for a line of its own: torch and
all that needs it are tried in `trials.py`.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from magneto_dist.doctor.finding import Finding

GB = 1e9
_NAMED = ("torch", "torchvision", "accelerate", "deepspeed", "nvidia-dali-cuda130", "simplejpeg")
"""Packages whose versions explain most differences between machines."""
_INSTALL = "python -m pip install -e ."


def machine_findings(folder: Path) -> Iterator[Finding]:
    """All that can be looked up; `folder` is where runs and data sets will be written."""
    yield python_finding(sys.version_info[:3])
    yield looked_up("packages", lambda: packages_finding(_requirements()))
    yield looked_up("memory", lambda: memory_finding(available_memory_bytes()))
    yield disk_finding(folder, shutil.disk_usage(existing(folder)).free)
    yield shared_memory_finding(shutil.disk_usage("/dev/shm").free, min(usable_cores() - 1, 8))
    yield open_files_finding(resource.getrlimit(resource.RLIMIT_NOFILE))
    yield looked_up(
        "network", lambda: network_finding(network_addresses(), own_address(), os.environ)
    )


def looked_up(name: str, look: Callable[[], Finding]) -> Finding:
    """What `look` finds; or that a package which it needs cannot be imported."""
    try:
        return look()
    except ImportError as error:
        return Finding(name, "fail", f"cannot be looked up: {error}", _INSTALL)


def _requirements() -> list[str]:
    try:
        return requires("magneto-dist") or []
    except PackageNotFoundError:
        return ["magneto-dist"]  # which is then what is missing


def python_finding(running: Sequence[int]) -> Finding:
    """Whether this Python is new enough."""
    found = ".".join(map(str, running))
    if tuple(running) < (3, 11):
        return Finding("python", "fail", found, "use Python 3.11 or newer")
    return Finding("python", "ok", found)


def packages_finding(requirements: Sequence[str]) -> Finding:
    """Whether all that `requirements` (as in package metadata) ask for is installed."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in requirements]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong, named = [], []
    for requirement in wanted:
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.name in _NAMED:
            named.append(f"{requirement.name} {installed}")
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        return Finding("packages", "fail", ", ".join(wrong), _INSTALL)
    return Finding("packages", "ok", ", ".join(named))


def memory_finding(available_bytes: float) -> Finding:
    """Whether a process that trains and its loaders are likely to fit."""
    found = f"{available_bytes / GB:.1f} GB free for {usable_cores()} usable cores"
    if available_bytes < 2 * GB:
        return Finding("memory", "fail", found, "end other programs, or take a larger machine")
    if available_bytes < 8 * GB:
        return Finding("memory", "warn", found, "lower --data.num_workers if processes are killed")
    return Finding("memory", "ok", found)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def available_memory_bytes() -> float:
    """What this machine, or the container that we are in, can still give."""
    import psutil

    free = float(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, float(most) - float(used.read_text()) + _given_back_bytes(used.parent))
    return free


def _given_back_bytes(group: Path) -> float:
    """Files in the page cache of a container count as used, until somebody wants the memory."""
    lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    stat = {name: float(value) for name, value in lines}
    return stat["active_file"] + stat["inactive_file"]


def disk_finding(folder: Path, free_bytes: float) -> Finding:
    """Whether runs and data sets can be written there."""
    found = f"{free_bytes / GB:.1f} GB free in {folder}"
    if not os.access(existing(folder), os.W_OK):
        return Finding("disk", "fail", f"{folder} cannot be written", "choose another --output_dir")
    if free_bytes < GB:
        return Finding("disk", "fail", found, "free some, or choose another --output_dir")
    if free_bytes < 20 * GB:
        return Finding("disk", "warn", found, "a data set and its checkpoints may not fit")
    return Finding("disk", "ok", found)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def shared_memory_finding(free_bytes: float, num_workers: int) -> Finding:
    """Whether batches find room on their way from loader processes."""
    found = f"{free_bytes / GB:.2f} GB free in /dev/shm"
    # Two batches of 256 pictures of 224 px for each loader process; a container has 64 MB.
    needed_bytes = max(num_workers, 1) * 2 * 256 * 3 * 224 * 224
    if free_bytes < needed_bytes:
        fix = f"{needed_bytes / GB:.2f} GB are wanted: docker run --ipc=host or --shm-size=8g"
        return Finding("/dev/shm", "warn", found, f"{fix}, or --data.num_workers 0")
    return Finding("/dev/shm", "ok", found)


def open_files_finding(limits: tuple[int, int]) -> Finding:
    """Whether shards, sockets and shared memory may all be open at once; (soft, hard) limit."""
    soft, hard = limits
    unlimited = soft == resource.RLIM_INFINITY
    # The demo trains with 32 and not with 20; with 128 and 16 loader processes, too.
    if not unlimited and soft < 256:
        state = "fail" if soft < 32 else "warn"
        most = "unlimited" if hard == resource.RLIM_INFINITY else min(hard, 65536)
        return Finding("open files", state, f"at most {soft}", f"ulimit -n {most}")
    return Finding("open files", "ok", "no limit" if unlimited else f"at most {soft}")


def network_addresses() -> dict[str, list[str]]:
    """Interface that is up -> its IPv4 and IPv6 addresses, link-local ones left out."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    states = psutil.net_if_stats()
    return {
        name: [a.address for a in addresses if a.family in families and a.address[:4] != "fe80"]
        for name, addresses in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }


def own_address() -> str | None:
    """Where this machine's own name leads, which is what gloo takes; None: nowhere."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def network_finding(
    addresses: Mapping[str, Sequence[str]], own: str | None, environment: Mapping[str, str]
) -> Finding:
    """Which interfaces NCCL and gloo can take, and whether they will take a good one."""
    outer = {n: a for n, a in addresses.items() if a and not all(map(_is_loopback, a))}
    found = ", ".join(f"{name} {' '.join(listed)}" for name, listed in addresses.items() if listed)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        chosen = environment.get(variable, "")
        exact = variable.startswith("GLOO") or chosen.startswith("=")  # NCCL: prefixes, ^ excludes
        if exact and chosen and chosen.lstrip("=") not in addresses:
            fix = f"unset {variable}, or set it to one of {', '.join(outer or addresses)}"
            return Finding("network", "fail", f"{variable}={chosen} is not up here ({found})", fix)
    if outer and (own is None or _is_loopback(own)) and not environment.get("GLOO_SOCKET_IFNAME"):
        name = next(iter(outer))
        fix = f"for several nodes: GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}"
        leads = f"{socket.gethostname()} leads to {own or 'no address'}"
        return Finding("network", "warn", f"{found}; {leads}", fix)
    if not outer:
        return Finding("network", "warn", f"{found or 'no interface'}", "several nodes need one")
    return Finding("network", "ok", found)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
