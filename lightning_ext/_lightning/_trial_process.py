"""Runs work in a forked child, which may run out of host memory without harm to this process.

Source: Linux, proc(5), getrlimit(2), cgroups(7).
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from lightning_ext._lightning._out_of_memory import is_out_of_memory

_POLL_SECONDS = 0.005


class Outcome(NamedTuple):
    """How a trial ended.

    Args:
        fits: Whether the work was done within the limit.
        peak_bytes: The most memory that it took on top of what was held before.
        reason: Why it does not fit: ``"out of memory"``, ``"killed"`` or ``"timed out"``.
    """

    fits: bool
    peak_bytes: int
    reason: str = ""


class _Report(NamedTuple):
    """What a child tells its parent."""

    ended: str  # "done", "out of memory" or "raised"
    peak: int
    text: str


def can_fork() -> bool:
    """Whether a child of this process could run a training step.

    Autograd refuses to work in the child of a process that has an accelerator.
    """
    return sys.platform == "linux" and not torch.accelerator.is_available()


def held_bytes() -> int:
    """Memory that this process holds; the code and files that it maps do not count."""
    status = _status("self")
    return status.get("VmRSS", 0) - status.get("RssFile", 0)


def host_bytes() -> int:
    """Memory of the host, 0 where it does not say."""
    return _numbers(Path("/proc/meminfo")).get("MemTotal:", 0) << 10


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that the host and the control groups of this process would still give.

    Args:
        root: Where ``proc`` and ``sys`` are found.
    """
    host = _numbers(root / "proc/meminfo").get("MemAvailable:", sys.maxsize >> 10) << 10
    return min([host, *_group_rooms(root)])


def in_child(work: Callable[[], None], *, limit_bytes: int, seconds: float) -> Outcome:
    """Runs work in a forked child and says whether it stayed within a limit.

    The child has one thread and is the first that the kernel ends where memory runs out. This
    process ends it where it holds more than the limit, or takes too long.

    Args:
        work: What to run; whatever it changes is lost.
        limit_bytes: The most that a process may hold, what this one holds already included.
        seconds: Time after which the child is ended.

    Raises:
        RuntimeError: The work raised an error that is not about memory, or the child died of one.
    """
    held = held_bytes()
    receiver, sender = Pipe(duplex=False)
    with warnings.catch_warnings():
        # Python 3.12 on, where there are threads: the child runs none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _serve(sender, work)
    sender.close()
    try:
        peak, reason = _watch(pid, receiver, limit_bytes, time.monotonic() + seconds)
        report = None if reason else _received(receiver)
    finally:
        receiver.close()
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if report is None:
        return _of_the_dead(status, max(peak - held, 0), reason)
    return _of_the_living(report, limit_bytes, held)


def _of_the_living(report: _Report, limit_bytes: int, held: int) -> Outcome:
    peak = max(report.peak - held, 0)
    if report.ended == "out of memory" or report.peak > limit_bytes:
        return Outcome(False, peak, "out of memory")
    if report.ended == "raised":
        raise RuntimeError(f"A trial of the training step raised an error:\n\n{report.text}")
    return Outcome(True, peak)


def _of_the_dead(status: int, peak: int, reason: str) -> Outcome:
    died_of = os.waitstatus_to_exitcode(status)
    if reason or died_of == -signal.SIGKILL:
        return Outcome(False, peak, reason or "killed")
    how = signal.Signals(-died_of).name if died_of < 0 else f"exit code {died_of}"
    raise RuntimeError(f"A trial of the training step ended its process: {how}.")


def _watch(pid: int, receiver: Connection, limit: int, deadline: float) -> tuple[int, str]:
    """Waits for the report or the child's death; the peak seen, and a reason to end the child."""
    peak = 0
    while not receiver.poll(_POLL_SECONDS):
        peak = max(peak, _peak_bytes(pid))
        if peak > limit:
            return peak, "out of memory"
        if time.monotonic() > deadline:
            return peak, "timed out"
    return peak, ""


def _received(receiver: Connection) -> _Report | None:
    try:
        return _Report(*receiver.recv())
    except EOFError:
        return None


def _serve(sender: Connection, work: Callable[[], None]) -> NoReturn:
    """The child: it reports and ends, and nothing returns into its copy of the program."""
    try:
        sender.send(tuple(_run(work)))
    finally:
        os._exit(0)


def _run(work: Callable[[], None]) -> _Report:
    try:
        gc.freeze()  # garbage of the parent may wait for its threads when it is taken away
        torch.set_num_threads(1)  # the threads that the pool knows stayed with the parent
        _expect_death()
        work()
    except BaseException as error:  # the parent raises what is not about memory
        text = traceback.format_exc()
        ended = "out of memory" if is_out_of_memory(error) else "raised"
        return _Report(ended, _peak_bytes("self"), text)
    return _Report("done", _peak_bytes("self"), "")


def _expect_death() -> None:
    """Makes the kernel choose this process, and allocations fail where all memory is gone.

    The limit on data lies at what the host has, above the limit of the trial: near it libraries
    fail in ways of their own, oneDNN with "could not create a primitive".
    """
    import resource

    with suppress(OSError):  # where the kernel does not offer it, it is a wish
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _status("self").get("VmData", 0) + available_bytes()
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _peak_bytes(pid: int | str) -> int:
    status = _status(pid)
    peak = status.get("VmHWM", status.get("VmRSS", 0))
    return peak - status.get("RssFile", 0)


def _status(pid: int | str) -> dict[str, int]:
    """Entries of ``status`` that are sizes, in bytes; a process that has ended has none."""
    numbers = _numbers(Path(f"/proc/{pid}/status"))
    return {name.rstrip(":"): kilobytes << 10 for name, kilobytes in numbers.items()}


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    if not path.exists():
        return {}
    rows = [line.split() for line in path.read_text().splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _group_rooms(root: Path) -> Iterator[int]:
    """What each control group above this process has left, in version 2 and in version 1."""
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the group may be mounted as the root, and the path lead nowhere.
        folder = base / path.strip("/")
        for group in (folder, *folder.parents):
            yield from _group_room(group, *names)
            if group == base:
                break


def _group_room(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    files = (group / limit, group / usage)
    if not all(file.exists() for file in files):
        return
    most, used = (file.read_text().strip() for file in files)
    if most != "max":
        yield int(most) - int(used) + _numbers(group / "memory.stat").get(reclaimable, 0)
