"""Run one function in several processes, as torchrun would, and bring the results back."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import Any, Literal

import torch
from torch.distributed import TCPStore

StartMethod = Literal["fork", "spawn"]


class ChildTraceback(Exception):
    """The traceback of a rank, as text: the cause of the exception that the parent raises."""

    def __str__(self) -> str:
        """Start on a line of its own."""
        return "\n" + self.args[0]


def run_distributed(
    fn: Callable[..., Any],
    world_size: int = 2,
    *,
    start_method: StartMethod | None = None,
    timeout: float = 90.0,
    return_exceptions: bool = False,
    args: tuple[Any, ...] = (),
) -> list[Any]:
    """Call `fn(*args)` in `world_size` processes and return the results by rank.

    The environment is torchrun's, so that Lightning starts no process of its own and builds the
    process group; `fn` may build it instead. It is destroyed at the end.

    Args:
        fn: Function of the top level of a module; a lambda or an inner function is refused,
            because it could not be spawned.
        world_size: Processes, all on this host.
        start_method: `"fork"` (0.1 s) or `"spawn"` (about 5 s, it imports torch again). Default
            fork where there is no CUDA: with it a child of a process that ran `backward` cannot.
        timeout: Seconds for all ranks together.
        return_exceptions: The others go on when a rank raises or dies, and its exception is
            returned in the place of its result.
        args: Arguments, the same for all ranks; pickled, so a tensor arrives as a copy.

    Returns:
        What `fn` returned on each rank.

    Raises:
        TimeoutError: A rank did not finish; all are killed.
        RuntimeError: A rank died, or raised an exception that does not pickle.
        Exception: What the first failing rank raised, caused by that rank's traceback.
    """
    call = pickle.dumps((fn, args))
    context = _context(start_method or _default_start_method())
    # As torchrun's agent does, the parent keeps the store: no port is free for others in between.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = _torchrun_environment(world_size, store.port)
    workers: dict[Connection, BaseProcess] = {}
    # Nobody connects before all are forked: the store's thread may hold a lock while it serves.
    forked = context.Event()
    try:
        with _garbage_kept():
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                worker = context.Process(target=_work, args=(sender, call, ranked, forked))
                worker.start()
                workers[receiver] = worker
                sender.close()
        forked.set()
        return _collect(workers, time.monotonic() + timeout, return_exceptions)
    finally:
        for receiver, process in workers.items():
            process.kill()
            process.join()
            receiver.close()


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Children do not collect what was let go of before, even while they are forked.

    A store of an earlier call, say, waits at its end for a thread that a child does not have.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _default_start_method() -> StartMethod:
    return "spawn" if torch.cuda.is_available() or sys.platform != "linux" else "fork"


def _context(start_method: StartMethod) -> ForkContext | SpawnContext:
    if start_method == "fork":
        return multiprocessing.get_context("fork")
    return multiprocessing.get_context("spawn")


def _torchrun_environment(world_size: int, port: int) -> dict[str, str]:
    return {
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }


def _collect(
    workers: dict[Connection, BaseProcess], deadline: float, return_exceptions: bool
) -> list[Any]:
    results: dict[Connection, Any] = {}
    while waiting := [receiver for receiver in workers if receiver not in results]:
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = [rank for rank, receiver in enumerate(workers) if receiver in waiting]
            raise TimeoutError(f"ranks {ranks} of {len(workers)} did not finish in time")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            try:
                results[receiver] = _receive(receiver, workers[receiver])
            except Exception as error:
                if not return_exceptions:
                    raise
                results[receiver] = error
    for process in workers.values():  # let each rank take its process group down
        process.join(max(0.0, deadline - time.monotonic()))
    return [results[receiver] for receiver in workers]


def _receive(receiver: Connection, process: BaseProcess) -> Any:
    try:
        ok, payload, text = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{process.name} died with exit code {process.exitcode}") from None
    if ok:
        return pickle.loads(payload)
    raise pickle.loads(payload) from ChildTraceback(text)


def _work(sender: Connection, call: bytes, environment: dict[str, str], forked: Event) -> None:
    forked.wait()
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        fn, args = pickle.loads(call)
        sender.send((True, pickle.dumps(fn(*args)), ""))
    except Exception as error:  # not swallowed: the parent raises it
        sender.send((False, _dump_error(error), traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _dump_error(error: Exception) -> bytes:
    """Pickle an exception; one that does not survive that becomes a RuntimeError of its text."""
    try:
        payload = pickle.dumps(error)
        pickle.loads(payload)
    except (pickle.PicklingError, TypeError, AttributeError):
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return payload
