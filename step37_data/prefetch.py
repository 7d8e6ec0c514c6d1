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
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch

from step37_data.common.checks import checked_int, item_at
from step37_data.images.decode import BrokenImages
from step37_data.images.device import Device, resolve_device

_Input = TypeVar("_Input")

# How long the end of the interpreter, or an error on its way, waits for the pack in the making.
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
    """What became of a pack.

    Attributes:
        pack: its index.
        next_pack: index of the pack to go on with once this one is given.
        value: the model input.
        ready: the event after which a CUDA device has it.
        error: why there is no model input.
    """

    pack: int
    next_pack: int
    value: Any = None
    ready: torch.cuda.Event | None = None
    error: BaseException | None = None


class _Worker(threading.Thread):
    """Makes the input of one pack after the other until it is told to stop.

    The thread has no reference to its prefetcher, so that Python can collect a prefetcher that
    nobody uses any more, whose finalizer then stops the thread. Both queues are ``SimpleQueue``,
    the only one that a finalizer may use.

    Attributes:
        room: an entry for every pack that may be made; the thread takes one for each.
        made: what it made, in order; None comes behind the last pack.
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
        # A daemon: the interpreter waits at its end for all other threads, however stuck they are.
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
        """Make no other pack; wait for the one in the making, ``wait_s`` seconds at most."""
        self._stopped = True
        self.room.put(None)
        # The garbage collector may end the prefetcher in this very thread.
        if self is not threading.current_thread():
            self.join(wait_s)

    def run(self) -> None:
        # A call of its own for each pack, so that nothing of a pack is kept while the next waits.
        while self._make_next():
            pass

    def _make_next(self) -> bool:
        """Wait for room, then make the input of one pack. False where that was the last."""
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
            # An error of the device comes before a pack is read: that pack is not lost.
            failed = max(before, self._next_read - 1)
            self.made.put(_Made(failed, max(self._next_read, self._start), error=error))
        return True


def _current(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[Any]:
    """Make ``stream`` and its device the current ones of this thread."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


class Prefetcher(Iterator[_Input]):
    """Iterate over prepared packs; while one is used, the next ``depth`` are made ready.

    One thread reads the packs and prepares them, in order and on a CUDA stream of its own; decoding
    has its own threads below that. What ``next`` gives may be used on the caller's current stream
    at once: the stream waits for it, the host does not.

    A pack that fails raises :class:`PackError`; the next call goes on with the pack after it. A
    pack before ``start`` that cannot be read, of an iterable, does so too, and leaves the state as
    it is.

    Several threads may call ``next``: each pack goes to one of them. A process that is forked off
    needs its own prefetcher. The end of the interpreter waits a second at most for the pack in the
    making.

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
                if not self._closed:  # else another thread did, while this one waited
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
        """``{"next_pack": index}``: pass it as ``start`` to go on behind the last pack given."""
        return {"next_pack": self._next_pack}

    def close(self, wait_s: float | None = None) -> list[_Input]:
        """End the thread: wait for the pack in the making, return what is ready. Idempotent.

        Args:
            wait_s: seconds to wait at most; None waits until it is made.
        """
        self._closed = True
        self._worker.stop(wait_s)
        left = []
        with contextlib.suppress(queue.Empty):
            while True:
                left.append(self._worker.made.get_nowait())
        self._worker.made.put(None)  # for a thread that waits in ``next``
        return [made.value for made in left if made is not None and made.error is None]

    def __enter__(self) -> Prefetcher[_Input]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # On the way out of an error nobody waits for a pack that may be stuck.
        self.close(None if kind is None else _LAST_WAIT_S)


@runtime_checkable
class CountsUsedPacks(Protocol):
    """An iterator of packs that may be read ahead although it saves its state.

    Energon's packs here are one. Its state leaves out what was read and is not used yet.
    """

    def read_ahead_by(self, count_used: Callable[[], int]) -> None:
        """From now on ``count_used()`` says how many of the packs read since are used."""

    def save_state(self) -> Any:
        """The state to go on from behind the packs that are used."""


class _Count:
    """How many packs were given on: an object of its own, because the replaced iterator keeps it,
    and keeping the ``ReadAhead`` would keep its thread.
    """

    given = 0


class ReadAhead(Iterator[Any]):
    """Takes the place of an iterator of packs: it gives the same packs in the same order, and has
    the model input of the next ``depth`` made meanwhile.

    :meth:`prepared` then has the model input of the pack that was given last. A pack that nobody
    prepares (a step that is skipped) is no loss but its work. After :meth:`close` it goes on with
    what is left, unprepared: no pack is lost, none comes twice.

    Args:
        packs: the iterator that is replaced; nobody may go on reading it. One that is a
            :class:`CountsUsedPacks` is told how many of its packs were given on, and its
            ``save_state`` is offered here.
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
        if isinstance(packs, CountsUsedPacks):  # before the first is read
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
                    # Of the replaced iterator itself, which would have raised it bare.
                    raise (error.__cause__ or error) from None
                pack = self._last.pack
            self._count.given += 1
            return pack

    def prepared(self, pack: Any) -> Any:
        """The model input of a pack; made now, if it is another than the one given last.

        Raises:
            PackError: it could not be prepared ahead of its use. Made now, what ``prepare`` raises.
        """
        with self._turn:
            last, index = self._last, self._count.given - 1
        if last is None or last.pack is not pack:
            return self._prepare(pack)
        if last.error is not None:
            raise PackError(index, last.error)
        return last.value

    def close(self) -> None:
        """End the threads. Idempotent."""
        with self._turn:
            if self._ahead is not None:
                self._left.extend(attempt.pack for attempt in self._ahead.close())
                self._ahead = None


class _Attempt(NamedTuple):
    """A pack, and its model input or why there is none."""

    pack: Any
    value: Any
    error: Exception | None


def _attempt(prepare: Callable[[Any], Any], pack: Any) -> _Attempt:
    try:
        return _Attempt(pack, prepare(pack), None)
    except Exception as error:
        return _Attempt(pack, None, error)


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
