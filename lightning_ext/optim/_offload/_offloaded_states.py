"""OffloadedStates: states of an optimizer in host memory, some of them on the device at a time.

Source: Ren et al. 2021 (ZeRO-Offload, arXiv:2101.06840), for states on the host, and Rajbhandari et
    al. 2021 (ZeRO-Infinity, arXiv:2104.07857), section 6, for copies that overlap.
Differs: the step is taken on the device, by whichever optimizer it is; gradients and weights stay
    there, so that accumulation, clipping, scalers and schedules see nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ext.optim._offload._chunk import Chunk, Views, state_bytes
from lightning_ext.optim._offload._lanes import Lanes, PlainStreams, streams_of
from lightning_ext.optim._offload._parts import HostStates, parts, replace, to_host
from lightning_ext.optim._offload._refusals import refuse_groups, refuse_whole
from lightning_ext.optim._step._closure import Closure, closure_loss
from lightning_ext.optim._wrappers._wrapper import Wrapper

_UNKNOWN = 8  # bytes an entry that states are taken to have before they are made: two of float32


class OffloadedStates(Wrapper):
    """Lets another optimizer step with its states in pinned host memory.

    A step goes over chunks of parameters: while one is updated the states of the next are copied to
    the device, and those of the last one back. The device holds two chunks of states; what it
    copies is twice the states a step. The update is the base's, bit for bit where that does not
    depend on a parameter's place in its list, as random rounding and products of stacked matrices
    do. Parameters on a CPU take the same way, by plain copies.

    The base has to step by parameter: AdamW and its like of ``torch.optim``, and of ours all that
    take no norm over all gradients and no votes. ``step`` of the base is called once a chunk, and
    so are hooks on it, which are better set on this one.

    ``state`` waits for copies under way. What is put into it goes to host memory, and so does what
    is loaded, a chunk at a time. ``state_dict`` is the base's.

    Args:
        base: the optimizer that steps. A wrapper such as ``LAWN`` goes around this one.
        chunk_bytes: of states that are on the device at a time, twice: one chunk is updated and
            one on its way. A parameter with larger states is a chunk of its own.

    Raises:
        ValueError: if ``chunk_bytes`` is not a positive whole number, the base clips by the norm of
            all gradients, or, at a step, parameters are on several devices.
        TypeError: if ``base`` is no optimizer, is not known to step by parameter, goes around
            another one, or has DTensors.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = OffloadedStates(torch.optim.AdamW([w], lr=0.5, weight_decay=0.0))
        >>> w.grad = torch.tensor([1.0, -2.0])
        >>> optimizer.step()
        >>> w.data
        tensor([0.5000, 1.5000])
    """

    def __init__(self, base: Optimizer, *, chunk_bytes: int = 2**26) -> None:
        whole = isinstance(chunk_bytes, int) and not isinstance(chunk_bytes, bool)
        if not whole or chunk_bytes < 1:
            raise ValueError(
                f"OffloadedStates got chunk_bytes={chunk_bytes!r}; give a whole number of bytes,"
                " such as 2**26"
            )
        refuse_whole(base)
        self._chunk_bytes = chunk_bytes
        self._forget()
        super().__init__(base)

    # An attribute of the parent, and here one that waits for what is read.
    @property
    def state(self) -> Any:
        """States by parameter, in host memory and up to date."""
        return HostStates(self._states)

    @state.setter
    def state(self, value: Any) -> None:
        if "base" in self.__dict__ and not isinstance(value, HostStates):
            self.base.state = value

    def check_settings(self) -> None:
        """Refuse groups that need all parameters at once, or have a part of them."""
        refuse_groups(self.base)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Take a step.

        Args:
            closure: computes the loss and its gradients; called first.

        Returns:
            What the closure returns.
        """
        with nullcontext() if closure is None else self.around_closure():
            loss = closure_loss(closure)
        params = [x for group in self.param_groups for x in group["params"]]
        self._settle(params)
        chunks = [x for x in self._chunks if any(p.grad is not None for p in x.home)]
        if chunks:
            self._go_through(chunks)
        known = {p for chunk in self._chunks for p in chunk.home}
        new = [p for p in params if p.grad is not None and p not in known]
        for batch in _split(new, [_UNKNOWN * p.numel() for p in new], self._chunk_bytes):
            with self._only(batch):
                self.base.step()
            for param in batch:
                self._keep_on_host(param)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, whose tensors are in host memory."""
        self._wait()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned, a chunk at a time.

        Args:
            state_dict: of this one or of the base alone, of the same groups.
        """
        self._wait()
        self._forget()
        states = state_dict["state"]
        sizes = [state_bytes(x) if isinstance(x, dict) else 0 for x in states.values()]
        found: dict[Any, Any] = {}
        for batch in _split(list(states), sizes, self._chunk_bytes) or [[]]:
            part = {index: states[index] for index in batch}
            self.base.load_state_dict({**state_dict, "state": part})
            for param, state in self.base.state.items():
                if isinstance(param, Tensor):
                    self._keep_on_host(param)
                found[param] = state
        self.base.state.update(found)
        self._link()

    def __getstate__(self) -> dict[str, Any]:
        self._wait()
        own = {"_chunks", "_lanes", "_buffers", "_device"}
        return {key: x for key, x in super().__getstate__().items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Have no chunks; states stay where they are until the next step."""
        self._chunks: list[Chunk] = []
        self._buffers: list[Tensor] = []
        self._lanes = Lanes(PlainStreams())
        self._device: torch.device | None = None

    def _wait(self) -> None:
        self._lanes.wait()

    def _states(self) -> Any:
        self._wait()
        return self.base.state

    def _keep_on_host(self, param: Tensor) -> None:
        if not param.is_cpu:
            to_host(self.base.state.get(param, {}))

    def _settle(self, params: list[Tensor]) -> None:
        """Make chunks of all states that have none, and of those whose tensors are others now."""
        device = _device_of(params)
        if device != self._device:
            self._wait()
            self._forget()
            self._device, self._lanes = device, Lanes(streams_of(device))
        states = self.base.state
        kept = [
            chunk
            for chunk in self._chunks
            if all(x in states and chunk.is_home(x, states[x]) for x in chunk.home)
        ]
        known = {p for chunk in kept for p in chunk.home}
        strays = [p for p in params if p in states and p not in known and any(parts(states[p]))]
        if strays or len(kept) < len(self._chunks):
            self._wait()
            sizes = [state_bytes(states[p]) for p in strays]
            batches = _split(strays, sizes, self._chunk_bytes)
            made = (
                Chunk({p: states[p] for p in batch}, pinned=device.type == "cuda")
                for batch in batches
            )
            self._chunks = [*kept, *made]
            self._buffers = _buffers(self._chunks, device)

    def _go_through(self, chunks: Sequence[Chunk]) -> None:
        lanes, buffers = self._lanes, self._buffers
        lanes.begin()
        lanes.fetch(0, chunks[0].pairs(buffers[0]))
        for i, chunk in enumerate(chunks):
            slot, other = i % 2, (i + 1) % 2
            if i + 1 < len(chunks):
                lanes.fetch(other, chunks[i + 1].pairs(buffers[other]))
            lanes.ready(slot)
            with self._staged(chunk, chunk.staged(slot, buffers[slot])), self._only(chunk.home):
                self.base.step()
            lanes.store(slot, chunk.pairs(buffers[slot]))

    @contextmanager
    def _staged(self, chunk: Chunk, views: Views) -> Iterator[None]:
        """Have a chunk's states on the device while the base steps."""
        for param, tensors in views.items():
            replace(self.base.state[param], tensors)
        try:
            yield
        finally:
            for param, tensors in views.items():
                state = self.base.state[param]
                back = {}
                for path, now in parts(state):
                    view = tensors.get(path)
                    if view is None or (now.shape, now.dtype) != (view.shape, view.dtype):
                        continue  # new: it gets a place at the next step
                    if now is not view:
                        view.copy_(now)
                    back[path] = chunk.home[param][path]
                replace(state, back)
                self._keep_on_host(param)

    @contextmanager
    def _only(self, params: Iterable[Tensor]) -> Iterator[None]:
        """Have no other parameters in the groups."""
        chosen, groups = set(params), list(self.base.param_groups)
        kept = [group["params"] for group in groups]
        try:
            for group, members in zip(groups, kept, strict=True):
                group["params"] = [x for x in members if x in chosen]
            yield
        finally:
            for group, members in zip(groups, kept, strict=True):
                group["params"] = members


def _split(items: list[Any], sizes: list[int], most: int) -> list[list[Any]]:
    """Cut a list into parts whose sizes add up to at most a number, or of one item."""
    found: list[list[Any]] = []
    room = 0
    for item, size in zip(items, sizes, strict=True):
        if not found or size > room:
            found.append([])
            room = most
        found[-1].append(item)
        room -= size
    return found


def _buffers(chunks: Sequence[Chunk], device: torch.device) -> list[Tensor]:
    longest = max([x.nbytes for x in chunks], default=0)
    return [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(2)]


def _device_of(params: Iterable[Tensor]) -> torch.device:
    devices = {x.device for x in params}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"OffloadedStates is for one device, and has parameters on {found}")
    return devices.pop() if devices else torch.device("cpu")
