"""The next packs' model input, made ready while the model works on this one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import torch

from step37_data.common.checks import checked_int, item_at
from step37_data.common.threads import Work, start_thread
from step37_data.images.decode import BrokenImages
from step37_data.images.device import Device, resolve_device

_Input = TypeVar("_Input")

# A pack that is in the making at the end of the interpreter may take that long.
_LAST_WAIT_S = 1.0
_NO_MORE = object()


class PackError(RuntimeError):
    """A pack could not be read or prepared; ``__cause__`` says why.

    Attributes:
        pack: its index.
    """

    def __init__(self, pack: int, cause: BaseException) -> None:
        super().__init__(f"pack {pack}: {type(cause).__name__}: {cause}")
        self.pack = pack
        self.__cause__ = cause


# A model input, and the event after which a CUDA device has it; None comes after the last pack.
_Prepared = tuple[_Input, torch.cuda.Event | None] | None


class Prefetcher(Iterator[_Input]):
    """Iterate over prepared packs, ``depth`` of them in the making while one is used.

    One thread reads the packs and prepares them, in order and on a CUDA stream of its own; decoding
    has its own threads below that. What ``next`` gives may be used on the caller's current stream
    at once: the stream waits for it, the host does not.

    A pack that fails raises :class:`PackError`; the next call goes on with the pack after it. So
    does an iterable's pack before ``start`` that fails when it is read; it moves no state on.

    Threads may take turns: each pack goes to one of them. A process that is forked off needs its
    own prefetcher. The end of the interpreter waits a second at most for the pack in the making.

    Packs are read ahead of their use. To resume, save :meth:`state_dict` of the prefetcher: a state
    of ``packs`` itself is ``depth`` packs further.

    Args:
        packs: a dataset with ``len`` and integer indices, or any iterable, a dataloader say.
        prepare: turns a pack into the model's input:
            ``functools.partial(preprocess_packed_batch, ...)``.
        depth: packs made ready beyond the one in use; each holds its images on the device.
        start: index of the first pack to give; an iterable's packs before it are read and dropped.
        device: the one that ``prepare`` works on; None is the CUDA device, or the CPU where there
            is none.
        broken: reported (``BrokenImages.report``) behind the last pack.

    Attributes:
        waited_s: seconds that ``next`` has waited for packs that were not ready, all in all.

    Raises:
        ValueError: ``depth`` or ``start`` is out of range.

    Example:
        >>> with Prefetcher([1, 2, 3], lambda pack: pack * 10, device="cpu", start=1) as prefetcher:
        ...     print(list(prefetcher), prefetcher.state_dict())
        [20, 30] {'next_pack': 3}
    """

    def __init__(
        self,
        packs: torch.utils.data.Dataset[Any] | Iterable[Any],
        prepare: Callable[[Any], _Input],
        *,
        depth: int = 2,
        start: int = 0,
        device: Device = None,
        broken: BrokenImages | None = None,
    ) -> None:
        checked_int("depth", depth)
        checked_int("start", start, 0)
        self._prepare = prepare
        self._broken = broken
        self._start = self._next_pack = start
        self.waited_s = 0.0
        self._closed = False
        self._device = resolve_device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._packs, self._read = _from(packs, start)
        self._turn = threading.Lock()
        self._process = os.getpid()
        self._work: Work = queue.SimpleQueue()
        self._thread = start_thread(self._work, "step37-prefetch")
        # Not of what is pending: an error there knows the prefetcher, which would never be let go.
        weakref.finalize(self, _end, self._work, self._thread, _LAST_WAIT_S)
        self._pending: deque[Future[_Prepared[_Input]]] = deque()
        for _ in range(depth):
            self._begin()

    def __iter__(self) -> Prefetcher[_Input]:
        return self

    def __next__(self) -> _Input:
        if os.getpid() != self._process:
            here = f"not in {os.getpid()}, which was forked from it; make a Prefetcher there"
            raise RuntimeError(f"Prefetcher: its thread runs in process {self._process}, {here}")
        with self._turn:
            if self._closed:
                raise StopIteration
            began = time.perf_counter()
            future = self._pending[0]
            error = future.exception()
            self.waited_s += time.perf_counter() - began
            # Only now: an interrupt while waiting must not lose the pack.
            self._pending.popleft()
            if error is not None:
                self._begin()
                if not isinstance(error, PackError):  # of the device: no pack was read
                    raise PackError(self._next_pack, error)
                # Not moved by a pack before the start, which was read only to get past it.
                self._next_pack = max(self._next_pack, error.pack + 1)
                # A fresh exception is raised: the stored traceback would keep this object alive.
                raise PackError(error.pack, error.__cause__ or error)
            prepared = future.result()
            if prepared is None:
                self.close()
                if self._broken is not None:
                    self._broken.report()
                raise StopIteration
            self._begin()
            self._next_pack += 1
            value, ready = prepared
            if ready is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(ready)
                for tensor in _cuda_tensors(value):
                    # Allocated on the prefetcher's stream, used on this one.
                    tensor.record_stream(stream)
            return value

    def _begin(self) -> None:
        self._pending.append(Future())
        self._work.put((self._pending[-1], self._make))

    def _make(self) -> _Prepared[_Input]:
        with contextlib.ExitStack() as on_device:
            if self._stream is not None:
                # The current device belongs to the thread.
                on_device.enter_context(torch.cuda.device(self._device))
                on_device.enter_context(torch.cuda.stream(self._stream))
            while True:
                number, self._read = self._read, self._read + 1
                try:
                    pack = next(self._packs, _NO_MORE)
                    if pack is _NO_MORE:
                        return None
                    if number >= self._start:
                        value = self._prepare(pack)
                        return value, None if self._stream is None else self._stream.record_event()
                except BaseException as error:
                    raise PackError(number, error) from error

    def state_dict(self) -> dict[str, int]:
        """``{"next_pack": index}``: pass it as ``start`` to go on behind the last pack given."""
        return {"next_pack": self._next_pack}

    def close(self, wait_s: float | None = None) -> list[_Input]:
        """End the thread: wait for the pack in the making, return what is ready. Idempotent.

        Args:
            wait_s: seconds to wait at most; None waits until it is made.
        """
        self._closed = True
        for future in tuple(self._pending):
            future.cancel()
        _end(self._work, self._thread, wait_s)
        ended = [f for f in self._pending if f.done() and not f.cancelled()]
        done = [f.result() for f in ended if f.exception() is None]
        self._pending.clear()
        return [made[0] for made in done if made is not None]

    def __enter__(self) -> Prefetcher[_Input]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # On the way out of an error nobody waits for a pack that may be stuck.
        self.close(None if kind is None else _LAST_WAIT_S)


def _end(work: Work, thread: threading.Thread, wait_s: float | None) -> None:
    """Drop what has not begun, and wait for what has."""
    with contextlib.suppress(queue.Empty):
        while True:
            work.get_nowait()
    work.put(None)
    if thread is not threading.current_thread():
        thread.join(wait_s)


class ReadAhead(Iterator[Any]):
    """An iterator of packs in another's place: the same packs in the same order for whoever asks,
    with the preparation of the next ``depth`` under way.

    :meth:`prepared` then has the model input of the pack that was given last. A pack that nobody
    prepares (a step that is skipped) is no loss but its work. After :meth:`close` it goes on with
    what is left, unprepared: no pack is lost, none comes twice.

    Args:
        packs: the iterator that is replaced; nobody may go on reading it. One that has
            ``read_ahead_by``, as Energon's packs here, is told how many of its packs were given on,
            and has its ``save_state`` here, too.
        prepare: turns a pack into the model's input.
        depth, device: see :class:`Prefetcher`.
    """

    def __init__(
        self, packs: Iterator[Any], prepare: Callable[[Any], Any], *, depth: int, device: Device
    ) -> None:
        self._packs, self._prepare = packs, prepare
        self._given: _Attempt | None = None
        self._left: deque[Any] = deque()
        self._index = -1
        self._turn = threading.Lock()
        savable: Any = packs
        if hasattr(savable, "read_ahead_by"):  # before the first is read
            savable.read_ahead_by(lambda: self._index + 1)
            self.save_state = savable.save_state
        rest = map(next, itertools.repeat(packs))  # Megatron's iterators have no __iter__
        self._ahead: Prefetcher[_Attempt] | None = Prefetcher(
            rest, self._attempt, depth=depth, device=device
        )

    def __next__(self) -> Any:
        with self._turn:
            self._given = None
            if self._ahead is None:
                pack = self._left.popleft() if self._left else next(self._packs)
            else:
                try:
                    self._given = next(self._ahead)
                except PackError as error:
                    # Of the replaced iterator itself, which would have raised it bare.
                    raise (error.__cause__ or error) from None
                pack = self._given.pack
            self._index += 1
            return pack

    def prepared(self, pack: Any) -> Any:
        """The model input of a pack; made now, if it is another than the one given last.

        Raises:
            PackError: it could not be prepared ahead of its use. Made now, what ``prepare`` raises.
        """
        with self._turn:
            given, index = self._given, self._index
        if given is None or given.pack is not pack:
            return self._prepare(pack)
        if given.error is not None:
            raise PackError(index, given.error)
        return given.value

    def close(self) -> None:
        """End the threads. Idempotent."""
        with self._turn:
            if self._ahead is not None:
                self._left.extend(attempt.pack for attempt in self._ahead.close())
                self._ahead = None

    def _attempt(self, pack: Any) -> _Attempt:
        try:
            return _Attempt(pack, self._prepare(pack), None)
        except Exception as error:
            return _Attempt(pack, None, error)


class _Attempt(NamedTuple):
    """A pack, and its model input or why there is none."""

    pack: Any
    value: Any
    error: Exception | None


def _from(packs: Any, start: int) -> tuple[Iterator[Any], int]:
    """An iterator of the packs, and the index of the first that it gives."""
    if not (hasattr(packs, "__getitem__") and hasattr(packs, "__len__")):
        return iter(packs), 0
    if start > len(packs):
        raise ValueError(f"start: expected at most {len(packs)}, the packs there are, got {start}")
    # Unlike a generator, a map goes on behind an error.
    return map(functools.partial(item_at, packs), range(start, len(packs))), start


def _cuda_tensors(value: object) -> Iterator[torch.Tensor]:
    """Every CUDA tensor in nested mappings, sequences and dataclasses."""
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _cuda_tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from _cuda_tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _cuda_tensors(getattr(value, field.name))
