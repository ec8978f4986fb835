"""Run one function on several nodes of one machine: network namespaces with a limited link."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from harness._distributed import run_distributed

CLONE_NEWNET = 0x40000000
INTERFACE = "eth0"  # of each node; the other end is a port of the switch
# What a rank sends beyond the limit waits; nothing is dropped, so that no time is lost to TCP.
SHAPE = "burst 64kb limit 64mb"


def run_on_nodes(
    fn: Callable[..., Any],
    nodes: int = 2,
    ranks_per_node: int = 2,
    *,
    inter_node_mbit: float | None = None,
    timeout: float = 90.0,
    return_exceptions: bool = False,
    args: tuple[Any, ...] = (),
) -> list[Any]:
    """Call `fn(*args)` on each rank of several nodes and return the results by rank.

    A node is a network namespace without a name, joined to the others by a switch in one more.
    Ranks of one node talk over its loopback. All vanish with the processes that hold them.

    Args:
        fn: Function of the top level of a module.
        nodes: At least one.
        ranks_per_node: Rank r is on node r // ranks_per_node.
        inter_node_mbit: What a node can send, and what it can receive, in 10⁶ bits per second;
            `None` is what the machine can do.
        timeout: Seconds for all ranks together.
        return_exceptions: As for `run_distributed`.
        args: Arguments, the same for all ranks; pickled.

    Returns:
        What `fn` returned on each rank.

    Raises:
        PermissionError: No right to make network namespaces; see `can_make_nodes`.
        TimeoutError: A rank did not finish; all are killed.
        RuntimeError: A rank died, or `ip` or `tc` failed.
        Exception: What the first failing rank raised, caused by that rank's traceback.
    """
    with _network(nodes, inter_node_mbit) as namespaces:
        store = _inside(namespaces[0], _serve)
        paths = [f"/proc/{os.getpid()}/fd/{namespace}" for namespace in namespaces]
        environment = _environment(nodes, ranks_per_node, store.port)
        try:
            return run_distributed(
                _work_on_node,
                nodes * ranks_per_node,
                timeout=timeout,
                return_exceptions=return_exceptions,
                args=(paths, environment, fn, args),
            )
        finally:
            del store  # its socket holds the first namespace, and a traceback would hold the store


def can_make_nodes() -> bool:
    """Whether this process may make network namespaces, and has the tools to join them."""
    if sys.platform != "linux" or not (shutil.which("ip") and shutil.which("tc")):
        return False
    try:
        os.close(_in_thread(_new_namespace))
    except PermissionError:
        return False
    return True


def cut_link() -> None:
    """Called on a rank: what leaves its node, or comes to it, is lost from now on."""
    _batch("ip", f"link set {INTERFACE} down")


def sent_by_node() -> int:
    """Called on a rank: bytes that its node has sent to others so far, headers included."""
    rows = Path("/proc/thread-self/net/dev").read_text(encoding="utf-8").splitlines()
    fields = next(row.split() for row in rows if row.strip().startswith(f"{INTERFACE}:"))
    return int(fields[9])


def address(node: int) -> str:
    """The address of a node on the others' network."""
    return f"10.0.0.{node + 1}"


def _work_on_node(
    paths: list[str], environment: dict[str, str], fn: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    node, local = divmod(int(os.environ["RANK"]), int(environment["LOCAL_WORLD_SIZE"]))
    with open(paths[node], encoding="utf-8") as namespace:
        _enter(namespace.fileno())  # of this thread; those that gloo starts are its children
    os.environ.update(environment | {"GROUP_RANK": str(node), "LOCAL_RANK": str(local)})
    return fn(*args)


def _environment(nodes: int, ranks_per_node: int, port: int) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(nodes * ranks_per_node),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "GROUP_WORLD_SIZE": str(nodes),
        "MASTER_ADDR": address(0),
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }


def _serve() -> TCPStore:
    return TCPStore(address(0), 0, is_master=True, wait_for_workers=False)


@contextmanager
def _network(nodes: int, mbit: float | None) -> Iterator[list[int]]:
    """Give file descriptors of a namespace for each node; who holds one keeps the namespace."""
    with ExitStack() as stack:
        switch, *namespaces = [_namespace(stack) for _ in range(nodes + 1)]
        _inside(switch, _batch, "ip", "link add switch type bridge", "link set switch up")
        for node, namespace in enumerate(namespaces):
            _inside(switch, _plug, node, namespace, mbit)
            _inside(namespace, _set_up, node, mbit)
        yield namespaces


def _namespace(stack: ExitStack) -> int:
    namespace = _in_thread(_new_namespace)
    stack.callback(os.close, namespace)
    return namespace


def _plug(node: int, namespace: int, mbit: float | None) -> None:
    port = f"port{node}"
    wire = (
        f"link add {port} type veth peer name {INTERFACE} netns /proc/{os.getpid()}/fd/{namespace}"
    )
    _batch("ip", wire, f"link set {port} master switch up")
    _limit(port, mbit)


def _set_up(node: int, mbit: float | None) -> None:
    up = "link set lo up", f"address add {address(node)}/24 dev {INTERFACE}"
    _batch("ip", *up, f"link set {INTERFACE} up")
    _limit(INTERFACE, mbit)


def _limit(device: str, mbit: float | None) -> None:
    if mbit is not None:
        _batch("tc", f"qdisc add dev {device} root tbf rate {round(mbit * 1e6)}bit {SHAPE}")


def _batch(tool: str, *commands: str) -> None:
    command = [tool, "-batch", "-"]
    done = subprocess.run(command, input="\n".join(commands), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} {'; '.join(commands)}: {done.stderr.strip()}")


def _new_namespace() -> int:
    _call("unshare", CLONE_NEWNET)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _enter(namespace: int) -> None:
    _call("setns", namespace, CLONE_NEWNET)  # os.setns is there from Python 3.12 on


def _call(name: str, *args: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _inside(namespace: int, fn: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a namespace, from a thread: this one stays where it is."""

    def call() -> Any:
        _enter(namespace)
        return fn(*args)

    return _in_thread(call)


def _in_thread(fn: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn).result()
