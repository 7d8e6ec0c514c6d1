"""Prepares the model input of the next packs in a thread, while the model works on this one."""

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
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch

from step37_data.common.checks import checked_int, item_at
from step37_data.images.decode import BrokenImages
from step37_data.images.device import Device, resolve_device

_Input = TypeVar("_Input")

# Seconds to wait for the pack being prepared, when the interpreter ends or an error is raised.
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


class _Made(NamedTuple):
    """The result of preparing a pack.

    Attributes:
        pack: its index.
        next_pack: index of the pack to continue with after this one.
        value: the model input.
        ready: the event after which the model input is complete on a CUDA device.
        error: the error, if there is no model input.
    """

    pack: int
    next_pack: int
    value: Any = None
    ready: torch.cuda.Event | None = None
    error: BaseException | None = None


class _Worker(threading.Thread):
    """The thread that prepares one pack after the other until it is stopped.

    The thread has no reference to its prefetcher. So Python can collect a prefetcher that is no
    longer used, and its finalizer stops the thread. Both queues are ``SimpleQueue``, the only kind
    that a finalizer may use.

    Attributes:
        room: a queue with one entry for every pack that may be prepared; the thread takes one each
            time.
        made: a queue of the results, in order; None comes after the last pack.
    """

    def __init__(
        self,
        packs: Iterator[Any],
        prepare: Callable[[Any], Any],
        *,
        first: int,
        start: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        # A daemon: at its end the interpreter waits for all other threads, even for stuck ones.
        super().__init__(name="step37-prefetch", daemon=True)
        self.room: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.made: queue.SimpleQueue[_Made | None] = queue.SimpleQueue()
        self._packs = packs
        self._prepare = prepare
        self._next_read = first
        self._start = start
        self._stream = stream
        self._stopped = False

    def stop(self, wait_s: float | None) -> None:
        """Start no other pack; wait at most ``wait_s`` seconds for the one being prepared."""
        self._stopped = True
        self.room.put(None)
        # The garbage collector may run the prefetcher's finalizer in this thread.
        if self is not threading.current_thread():
            self.join(wait_s)

    def run(self) -> None:
        # One call for each pack, so that local variables do not keep a pack while it waits.
        while self._make_next():
            pass

    def _make_next(self) -> bool:
        """Wait until a pack may be prepared, then prepare it; False after the last one."""
        self.room.get()
        if self._stopped:
            return False
        before = self._next_read
        try:
            with _current(self._stream):
                while True:
                    self._next_read += 1
                    pack = next(self._packs, _NO_MORE)
                    if pack is _NO_MORE:
                        self.made.put(None)
                        return False
                    if self._next_read > self._start:
                        break
                value = self._prepare(pack)
                ready = None if self._stream is None else self._stream.record_event()
            self.made.put(_Made(self._next_read - 1, self._next_read, value, ready))
        except BaseException as error:
            # If the device failed before a pack was read, that pack is not skipped.
            failed = max(before, self._next_read - 1)
            self.made.put(_Made(failed, max(self._next_read, self._start), error=error))
        return True


def _current(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[Any]:
    """Make ``stream`` and its device the current ones of this thread."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


class Prefetcher(Iterator[_Input]):
    """Iterates over packs and returns their model input; the next ``depth`` are prepared meanwhile.

    One thread reads the packs and prepares them, in order, on its own CUDA stream; it uses further
    threads for decoding. The result of ``next`` may be used on the caller's current stream at once:
    the stream waits for it, the host does not.

    If a pack fails, ``next`` raises :class:`PackError`, and the call after it continues with the
    next pack. The same error is raised for a pack of an iterable that is before ``start`` and
    cannot be read; the state does not change then.

    Several threads may call ``next``; each pack goes to one of them. A forked process needs its own
    prefetcher. When the interpreter ends, it waits at most a second for the pack being prepared.

    To resume, save :meth:`state_dict` of the prefetcher, not the state of ``packs``, which have
    been read ``depth`` packs ahead.

    Args:
        packs: a data set with ``len`` and integer indices, or any iterable, such as a dataloader.
        prepare: turns a pack into the model's input:
            ``functools.partial(preprocess_packed_batch, ...)``.
        depth: packs prepared beyond the one in use; the images of each are on the device.
        start: index of the first pack to return; of an iterable, packs before it are read too.
        device: the device that ``prepare`` uses; None is the CUDA device, or the CPU without one.
        broken: reported (``BrokenImages.report``) after the last pack.

    Attributes:
        waited_s: total seconds that ``next`` has waited for packs that were not ready.

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
        self._broken = broken
        self._next_pack = start
        self.waited_s = 0.0
        self._closed = False
        self._device = resolve_device(device)
        self._turn = threading.Lock()
        self._process = os.getpid()
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        to_read, first = _from(packs, start)
        self._worker = _Worker(to_read, prepare, first=first, start=start, stream=stream)
        for _ in range(depth):
            self._worker.room.put(None)
        self._worker.start()
        weakref.finalize(self, self._worker.stop, _LAST_WAIT_S)

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
            made = self._worker.made.get()
            self.waited_s += time.perf_counter() - began
            if made is None:
                if not self._closed:  # else another thread did that while this one waited
                    self.close()
                    if self._broken is not None:
                        self._broken.report()
                raise StopIteration
            self._worker.room.put(None)
            self._next_pack = made.next_pack
            if made.error is not None:
                raise PackError(made.pack, made.error)
            if made.ready is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(made.ready)
                for tensor in _cuda_tensors(made.value):
                    # Allocated on the prefetcher's stream, used on this one.
                    tensor.record_stream(stream)
            value: _Input = made.value
            return value

    def state_dict(self) -> dict[str, int]:
        """Return ``{"next_pack": index}``: pass it as ``start`` to continue after the last pack."""
        return {"next_pack": self._next_pack}

    def close(self, wait_s: float | None = None) -> list[_Input]:
        """End the thread; return the packs that are ready. May be called again.

        Args:
            wait_s: at most so many seconds to wait for the pack being prepared; None: no limit.
        """
        self._closed = True
        self._worker.stop(wait_s)
        left = []
        with contextlib.suppress(queue.Empty):
            while True:
                left.append(self._worker.made.get_nowait())
        self._worker.made.put(None)  # wakes a thread that waits in ``next``
        return [made.value for made in left if made is not None and made.error is None]

    def __enter__(self) -> Prefetcher[_Input]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error do not wait for a pack that may be stuck.
        self.close(None if kind is None else _LAST_WAIT_S)


@runtime_checkable
class CountsUsedPacks(Protocol):
    """An iterator of packs with a state of its own that may nevertheless be read ahead.

    Its saved state does not count packs that were read but not used. ``step37_energon`` has one.
    """

    def read_ahead_by(self, count_used: Callable[[], int]) -> None:
        """Set a function that returns how many of the packs read from now on have been used."""

    def save_state(self) -> Any:
        """Return the state from which to continue after the packs that have been used."""


class _Count:
    """Counts the packs returned by a :class:`ReadAhead`.

    It is a separate object because the replaced iterator refers to it; a reference to the
    ``ReadAhead`` would keep its thread alive.
    """

    given = 0


class ReadAhead(Iterator[Any]):
    """Replaces an iterator of packs: returns the same packs, and prepares the next ``depth`` ahead.

    :meth:`prepared` returns the model input of the pack that was returned last. It need not be
    called for every pack (a step may be skipped). After :meth:`close` the iterator continues with
    the remaining packs, without preparing them: no pack is lost and none comes twice.

    Args:
        packs: the iterator that is replaced, which must not be read by others any more. If it is a
            :class:`CountsUsedPacks`, it gets the number of packs returned, and its ``save_state``
            is an attribute here.
        prepare: turns a pack into the model's input.
        depth, device: see :class:`Prefetcher`.
    """

    def __init__(
        self, packs: Iterator[Any], prepare: Callable[[Any], Any], *, depth: int, device: Device
    ) -> None:
        self._packs, self._prepare = packs, prepare
        self._last: _Attempt | None = None
        self._left: deque[Any] = deque()
        self._count = count = _Count()
        self._turn = threading.Lock()
        if isinstance(packs, CountsUsedPacks):  # before the first pack is read
            packs.read_ahead_by(lambda: count.given)
            self.save_state = packs.save_state
        rest = map(next, itertools.repeat(packs))  # Megatron's iterators have no __iter__
        attempt = functools.partial(_attempt, prepare)
        self._ahead: Prefetcher[_Attempt] | None = Prefetcher(
            rest, attempt, depth=depth, device=device
        )

    def __next__(self) -> Any:
        with self._turn:
            self._last = None
            if self._ahead is None:
                pack = self._left.popleft() if self._left else next(self._packs)
            else:
                try:
                    self._last = next(self._ahead)
                except PackError as error:
                    # An error of the replaced iterator is raised as it is, not as a PackError.
                    raise (error.__cause__ or error) from None
                pack = self._last.pack
            self._count.given += 1
            return pack

    def prepared(self, pack: Any) -> Any:
        """Return the model input of a pack; prepare it now if it is not the last one returned.

        Raises:
            PackError: it could not be prepared ahead. If prepared now: any error of ``prepare``.
        """
        with self._turn:
            last, index = self._last, self._count.given - 1
        if last is None or last.pack is not pack:
            return self._prepare(pack)
        if last.error is not None:
            raise PackError(index, last.error)
        return last.value

    def close(self) -> None:
        """End the threads. May be called again."""
        with self._turn:
            if self._ahead is not None:
                self._left.extend(attempt.pack for attempt in self._ahead.close())
                self._ahead = None


class _Attempt(NamedTuple):
    """A pack, with its model input or the error of preparing it."""

    pack: Any
    value: Any
    error: Exception | None


def _attempt(prepare: Callable[[Any], Any], pack: Any) -> _Attempt:
    try:
        return _Attempt(pack, prepare(pack), None)
    except Exception as error:
        return _Attempt(pack, None, error)


def _from(packs: Any, start: int) -> tuple[Iterator[Any], int]:
    """Return an iterator of the packs, and the index of the first pack that it yields."""
    if not (hasattr(packs, "__getitem__") and hasattr(packs, "__len__")):
        return iter(packs), 0
    if start > len(packs):
        raise ValueError(f"start: expected at most {len(packs)}, the packs there are, got {start}")
    # Unlike a generator, a map can be used again after an error.
    return map(functools.partial(item_at, packs), range(start, len(packs))), start


def _cuda_tensors(value: object) -> Iterator[torch.Tensor]:
    """Yield every CUDA tensor in nested mappings, sequences and dataclasses."""
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
