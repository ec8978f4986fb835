import multiprocessing
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Classifier, dataset, fit, run_on_nodes, sent_by_node
from harness._nodes import address, cut_link
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ext.scaling import collective_traffic

pytestmark = pytest.mark.nodes
Left = Callable[[], set[str]]
MBIT = 20.0
SENT_BYTES = 1_000_000


def seconds_of(sender: int, receiver: int) -> float:
    """Until the receiver has thanked for what it got."""
    payload, thanks = torch.zeros(SENT_BYTES, dtype=torch.uint8), torch.zeros(1)
    dist.barrier()
    start = time.perf_counter()
    if dist.get_rank() == sender:
        dist.send(payload, receiver)
        dist.recv(thanks, receiver)
    elif dist.get_rank() == receiver:
        dist.recv(payload, sender)
        dist.send(thanks, sender)
    return time.perf_counter() - start


def seconds_inside_out_and_back() -> tuple[float, ...]:
    dist.init_process_group("gloo")
    return tuple(seconds_of(*pair) for pair in ((0, 1), (0, 2), (2, 0)))


def sent_by_all_to_all() -> int:
    dist.init_process_group("gloo")
    payload = torch.zeros(SENT_BYTES, dtype=torch.uint8)
    received = torch.empty_like(payload)
    dist.barrier()
    before = sent_by_node()
    dist.barrier()
    dist.all_to_all_single(received, payload)
    dist.barrier()
    return sent_by_node() - before


def environment() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return {name: os.environ[name] for name in names}


def own_interfaces() -> list[str]:
    lines = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True)
    return [line.split(":")[1].split("@")[0].strip() for line in lines.stdout.splitlines()]


def succeed() -> int:
    dist.init_process_group("gloo")
    dist.barrier()
    return dist.get_rank()


def fail_on_rank_two() -> None:
    if succeed() == 2:
        raise LookupError("nothing here")
    time.sleep(60)


def kill_rank_three() -> None:
    if succeed() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def hang() -> None:
    time.sleep(60)


def interrupt_the_parent() -> None:
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


def reach_over_a_cut_link() -> tuple[float, float, str]:
    patience = timedelta(seconds=2)
    dist.init_process_group("gloo", timeout=patience)
    neighbours = dist.new_subgroups(2, timeout=patience)[0]
    value = torch.ones(1)
    dist.all_reduce(value)
    dist.barrier()
    if dist.get_rank() == 0:
        time.sleep(0.5)  # the barrier may not have reached all
        cut_link()
    dist.all_reduce(value, group=neighbours)
    start = time.perf_counter()
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(value.clone())
    return value.item(), time.perf_counter() - start, str(caught.value)


def fitted(strategy: Any, **kwargs: Any) -> dict[str, Any]:
    data = dataset(96, torch.float64)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    order = DistributedSampler(data, world, rank, shuffle=False)
    train = DataLoader(data, 16 // world, sampler=order)
    module = Classifier("adamw", dropout=0).double()
    kwargs = {"accumulate_grad_batches": 1, "use_distributed_sampler": False} | kwargs
    module, run = fit(module=module, train=train, strategy=strategy, **kwargs)
    names = ("num_nodes", "global_rank", "local_rank", "node_rank", "world_size")
    return {name: getattr(run, name) for name in names} | {"weights": module.state_dict()}


def fitted_on_two_nodes() -> dict[str, Any]:
    return fitted(DDPStrategy(), num_nodes=2, devices=2)


def open_files() -> set[str]:
    """Of this process; a namespace lives as long as a file or a socket of it."""
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return {os.readlink(link) for link in links if link.is_symlink()}  # the listing's own is gone


@pytest.fixture
def left() -> Left:
    """Returns what is there now and was not before: files, processes, network interfaces."""
    run_on_nodes(succeed)  # opens what is opened once for all
    before = open_files() | set(own_interfaces())

    def new() -> set[str]:
        processes = {process.name for process in multiprocessing.active_children()}
        return (open_files() | set(own_interfaces()) | processes) - before

    return new


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal, also in a worker of xdist."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_only_what_leaves_a_node_is_limited() -> None:
    seconds = run_on_nodes(seconds_inside_out_and_back, inter_node_mbit=MBIT)[0]
    inside, there, back = (SENT_BYTES * 8e-6 / each for each in seconds)
    assert MBIT / 4 < there < 2 * MBIT
    assert MBIT / 4 < back < 2 * MBIT
    assert inside > 3 * max(there, back)


def test_a_link_carries_what_the_convention_of_bytes_says() -> None:
    said = 2 * collective_traffic("all_to_all", SENT_BYTES, size=4, local=2).inter_bytes
    for sent in run_on_nodes(sent_by_all_to_all):
        assert said < sent < 1.1 * said  # headers


def test_ranks_see_the_environment_of_torchrun() -> None:
    common = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": address(0)}
    for rank, seen in enumerate(run_on_nodes(environment)):
        own = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank % 2}", "GROUP_RANK": f"{rank // 2}"}
        assert seen == common | own


def test_a_node_has_nothing_of_the_hosts_network() -> None:
    before = own_interfaces()
    assert run_on_nodes(own_interfaces) == [["lo", "eth0"]] * 4
    assert own_interfaces() == before


@pytest.mark.parametrize("nodes", [1, 3])
def test_there_may_be_one_node_or_three(nodes: int) -> None:
    assert run_on_nodes(succeed, nodes, 1) == [*range(nodes)]


def test_a_cut_link_is_an_error_within_the_timeout() -> None:
    for value, seconds, text in run_on_nodes(reach_over_a_cut_link):
        assert value == 8.0  # 4 of all ranks, then twice that: neighbours still talked
        assert seconds < 10.0
        assert re.search("2000ms|closed by peer|reset by peer", text)


def test_nothing_is_left_behind_by_success(left: Left) -> None:
    assert run_on_nodes(succeed) == [0, 1, 2, 3]
    assert left() == set()


ENDS = {
    "error": (fail_on_rank_two, LookupError, "nothing here", 90.0),
    "death": (kill_rank_three, RuntimeError, "exit code -9", 90.0),
    "timeout": (hang, TimeoutError, r"ranks \[0, 1, 2, 3\] of 4", 1.0),
    "interrupt": (interrupt_the_parent, KeyboardInterrupt, None, 90.0),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.usefixtures("interruptible")
def test_a_failure_is_raised_at_once_and_nothing_is_left_behind(end: str, left: Left) -> None:
    fn, error, text, timeout = ENDS[end]
    start = time.monotonic()
    with pytest.raises(error, match=text):
        run_on_nodes(fn, timeout=timeout)
    assert time.monotonic() - start < 30  # the others sleep for 60 s
    assert left() == set()


def test_an_error_comes_with_the_traceback_of_its_rank() -> None:
    with pytest.raises(LookupError, match="nothing here") as caught:
        run_on_nodes(fail_on_rank_two)
    assert "fail_on_rank_two" in str(caught.value.__cause__)


def test_lightning_knows_its_nodes_and_trains_as_one_process_does() -> None:
    alone = fitted("auto")
    for rank, found in enumerate(run_on_nodes(fitted_on_two_nodes)):
        assert (found["num_nodes"], found["world_size"], found["global_rank"]) == (2, 4, rank)
        assert (found["node_rank"], found["local_rank"]) == divmod(rank, 2)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-12)
