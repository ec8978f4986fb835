"""Work in a child process that may die, and what the system says about memory."""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_ext._lightning import _trial_process
from lightning_ext._lightning._trial_process import (
    Outcome,
    available_bytes,
    can_fork,
    held_bytes,
    host_bytes,
    in_child,
)

MIB = 2**20
pytestmark = pytest.mark.skipif(not can_fork(), reason="needs Linux without an accelerator")


def tried(work: Callable[[], object], room: int = 64 * MIB, seconds: float = 30.0) -> Outcome:
    return in_child(lambda: (work(), None)[1], limit_bytes=held_bytes() + room, seconds=seconds)


def hold(size: int) -> None:
    torch.ones(size // 4).sum()


def test_what_the_work_changes_is_lost() -> None:
    values = torch.zeros(3)
    assert tried(lambda: values.add_(1)).fits
    assert values.tolist() == [0, 0, 0]


def test_the_peak_is_what_the_work_held() -> None:
    outcome = tried(lambda: hold(40 * MIB))
    assert outcome.fits
    assert outcome.peak_bytes == pytest.approx(40 * MIB, rel=0.05)


def test_work_that_holds_too_much_does_not_fit() -> None:
    outcome = tried(lambda: hold(80 * MIB))
    assert outcome == (False, outcome.peak_bytes, "out of memory")
    assert outcome.peak_bytes > 64 * MIB


def test_work_is_ended_while_it_grows() -> None:
    def grow() -> None:
        kept = []
        while True:
            kept.append(torch.ones(MIB))
            time.sleep(0.05)

    assert tried(grow, seconds=10).reason == "out of memory"


def test_a_failed_allocation_does_not_fit() -> None:
    outcome = tried(lambda: torch.empty(2**50))
    assert (outcome.fits, outcome.reason) == (False, "out of memory")


def test_a_child_that_the_kernel_kills_does_not_fit() -> None:
    outcome = tried(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert (outcome.fits, outcome.reason) == (False, "killed")


def test_a_child_that_hangs_is_ended() -> None:
    begun = time.monotonic()
    outcome = tried(lambda: time.sleep(60), seconds=0.3)
    assert (outcome.fits, outcome.reason) == (False, "timed out")
    assert time.monotonic() - begun < 10


def fail() -> None:
    raise KeyError("no such column")


def test_any_other_error_is_raised_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in fail.*KeyError: 'no such column'"):
        tried(fail)


def test_an_error_with_a_message_about_memory_is_still_an_error() -> None:
    def fail() -> None:
        raise ValueError("not enough memory of past batches")

    with pytest.raises(RuntimeError, match="past batches"):
        tried(fail)


def crash() -> None:
    faulthandler.disable()  # pytest's would print the stack of the child
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_is_raised_by_name() -> None:
    with pytest.raises(RuntimeError, match="SIGSEGV"):
        tried(crash)
    with pytest.raises(RuntimeError, match="exit code 3"):
        tried(lambda: os._exit(3))
    with pytest.raises(RuntimeError, match="SystemExit"):
        tried(lambda: sys.exit(3))


def test_a_peak_that_nobody_saw_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_trial_process, "_POLL_SECONDS", 30.0)
    assert tried(lambda: hold(80 * MIB)).reason == "out of memory"


def test_nobody_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_trial_process, "_watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tried(lambda: time.sleep(60))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_backward_works_in_the_child_of_a_process_that_ran_it() -> None:
    weight = torch.ones(64, 64, requires_grad=True)

    def step() -> None:
        (weight @ weight).sum().backward()

    torch.set_num_threads(2)  # so that a pool of threads exists, which the child does not have
    step()
    assert tried(step).fits


class Waits:
    """Waits, when it is taken away, for somebody who is not there in a child process."""

    def __init__(self) -> None:
        self.cycle = self
        self.pid = os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.pid:
            time.sleep(60)


def test_garbage_of_the_parent_is_not_the_childs_business() -> None:
    gc.disable()
    Waits()
    assert tried(gc.collect, seconds=5).fits
    gc.enable()
    gc.collect()


def test_the_child_is_the_first_to_go() -> None:
    def check() -> None:
        assert Path("/proc/self/oom_score_adj").read_text().strip() == "1000"
        soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
        assert 0 < soft < 2 * host_bytes()
        assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
        assert torch.get_num_threads() == 1

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    assert tried(check).fits
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits


def test_the_system_says_what_it_has() -> None:
    assert 0 < held_bytes() < host_bytes()
    assert 0 < available_bytes() <= host_bytes()


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 16000 kB\nMemAvailable: 9000 kB\nHugePages_Total: 0\n"}


def test_without_groups_the_host_decides(tmp_path: Path) -> None:
    write(tmp_path, MEMINFO)
    assert available_bytes(tmp_path) == 9000 << 10


def test_version_2_counts_files_that_can_go_as_free(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/job/run"
    write(tmp_path, MEMINFO | {"proc/self/cgroup": "0::/job/run\n"})
    write(
        tmp_path,
        {
            f"{group}/memory.max": "4000000\n",
            f"{group}/memory.current": "3000000\n",
            f"{group}/memory.stat": "anon 2000000\ninactive_file 500000\n",
        },
    )
    assert available_bytes(tmp_path) == 1_500_000


def test_a_group_above_may_be_the_narrower_one(tmp_path: Path) -> None:
    write(tmp_path, MEMINFO | {"proc/self/cgroup": "0::/job/run\n"})
    for group, limit in {"job/run": "max", "job": "2000"}.items():
        folder = f"sys/fs/cgroup/{group}"
        write(tmp_path, {f"{folder}/memory.max": limit, f"{folder}/memory.current": "500"})
    assert available_bytes(tmp_path) == 1500


@pytest.mark.parametrize("path", ["/", "/docker/abc"])
def test_version_1_inside_a_container(tmp_path: Path, path: str) -> None:
    group = "sys/fs/cgroup/memory"
    write(tmp_path, MEMINFO | {"proc/self/cgroup": f"5:cpu:/x\n4:memory:{path}\n0::/\n"})
    write(
        tmp_path,
        {
            f"{group}/memory.limit_in_bytes": "7000",
            f"{group}/memory.usage_in_bytes": "3000",
            f"{group}/memory.stat": "total_inactive_file 100\n",
        },
    )
    assert available_bytes(tmp_path) == 4100
