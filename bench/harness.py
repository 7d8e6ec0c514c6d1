"""Measures several implementations of an operation: checks results, counts, times, reports.

A *group* of rows is one operation on one set of inputs, done by several implementations in one
process. :func:`measure` does four things with a group:

1. Gate. Every implementation runs once on memory filled with NaN, and its result is compared with
   float64 values. One that fails is reported with the reason and not timed.
2. Count host synchronisations, kernel launches, and peak memory above that before the call.
3. Time. It takes one sample of each implementation in turn, round after round, until the group's
   time is used up. So a drifting clock or another process affects all of them equally.
4. Report the median and the 20th and 80th percentile.

A sample on CUDA is the time between events before and after the call. Other device work is queued
before them, enough that the host has issued the whole call before the device begins it. This is the
situation in a training step: the host runs ahead, so launches cost nothing until the host waits for
the device, and a wait costs its full time. (Host time is measured separately, on an idle device,
and has its own column.) The queued work reads a buffer larger than L2, and inputs rotate among
several random sets, so that nothing is in the cache. It does not write, because dirty cache lines
would be written back during the timed call.

On a CPU the same code runs with a host clock and without backlog, for this suite's own tests.
"""

from __future__ import annotations

import functools
import math
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import triton

Kind = Literal["ours", "stock", "peer", "floor"]
"""``ours``; ``stock``, which ours replaces; a ``peer``, which does the same in another way; or a
``floor``, which does only a part of the work, such as the bare matrix product, as a lower bound."""

LATE = "not run: time budget used up"
"""The problem of rows that were not measured before the deadline."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FOLDER = Path(__file__).parent
WARM_UP_ROUNDS = 5
MAX_SAMPLES = 200
MIN_SAMPLES = 5
MAX_BACKLOG_US = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a subject: what it measures, and for how long."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    impl: Literal["auto", "triton", "torch"] = "auto"  # implementation of the kernels under test
    shapes: tuple[str, ...] = ()  # names; empty: the subject's default
    row_seconds: float = 0.25  # timing budget of one row, or of one figure of a table
    deadline: float = math.inf  # ``time.perf_counter()`` after which groups are reported as not run
    compile_backend: str | None = "inductor"  # of ``torch.compile`` peers; None leaves them out
    options: Mapping[str, Any] = field(default_factory=dict)
    """Values of the subject's own options, by name without dashes."""

    @property
    def out_of_time(self) -> bool:
        """Whether the deadline has passed."""
        return time.perf_counter() > self.deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One implementation of a group's operation."""

    name: str
    kind: Kind
    prepare: Callable[[int], Any]
    """Makes the argument of :attr:`run` for input set ``i``, any i ≥ 0; not timed."""
    run: Callable[[Any], Any]  # timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Identifies a group of rows, so that two runs can be compared."""

    subject: str
    operation: str
    shape: str
    variant: str = ""  # layout of the inputs, or something else that a subject varies
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The least work of a group's operation; × limit and the rates are computed from it."""

    flops: int
    bytes: int  # each input that is needed is read once, each output is written once
    rows: int  # feature rows, images or samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The result of one implementation. A figure that was not measured is None."""

    key: Key
    work: Work
    implementation: str
    kind: Kind
    problem: str | None = None  # why there are no figures: failed gate, error, out of time
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    host_us: float | None = None  # median host time of the call on an idle device, until it returns
    samples: int = 0
    host_syncs: int | None = None
    launches: int | None = None
    peak_bytes: int | None = None
    """Peak of memory allocated during the call, above that before it."""
    kept_bytes: int | None = None
    """The part of it that is still allocated afterwards: results, and tensors for backward."""


Check = Callable[[Implementation, Any], str | None]
"""Checks an implementation's result on input set 0; returns what is wrong with it, or None."""


class CpuClock:
    """Measures the wall time of calls on the CPU."""

    def __init__(self) -> None:
        self.host_us: dict[str, float] = {}
        """Host time by name of an implementation, as :meth:`warm_up` measured it last."""

    def sample(self, implementation: Implementation, i: int) -> Callable[[], float]:
        """Run once on set ``i``; returns a function that gives µs after :meth:`settle`."""
        state = implementation.prepare(i)
        begin = time.perf_counter()
        implementation.run(state)
        elapsed = 1e6 * (time.perf_counter() - begin)
        return lambda: elapsed

    def settle(self) -> None:
        """Wait until samples can be read."""

    def warm_up(self, implementation: Implementation) -> None:
        """Run a few times on an idle device, and keep the median time until a call returns."""
        times = []
        for i in range(WARM_UP_ROUNDS):
            state = implementation.prepare(i)
            self.settle()
            begin = time.perf_counter()
            implementation.run(state)
            times.append(1e6 * (time.perf_counter() - begin))
        self.settle()
        self.host_us[implementation.name] = statistics.median(times)

    def poison(self, numbytes: int) -> None:
        """Fill free memory, which the next allocation gets, with NaN."""
        torch.full((max(numbytes, 4) // 4,), math.nan)

    def count(self, implementation: Implementation) -> dict[str, int | None]:  # noqa: ARG002
        """Count host syncs, launches and peak memory of one call, as fields of :class:`Row`."""
        return {}


class CudaClock(CpuClock):
    """Measures the device time of calls between events, with other work queued before them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._scratch = torch.rand(max(4 * cache, 2**28) // 4, device=device)
        self._sum = torch.empty((), device=device)
        times = []
        for _ in range(8):
            start, end = self._events()
            start.record()
            self._read()
            end.record()
            torch.cuda.synchronize(device)
            times.append(1e3 * start.elapsed_time(end))
        self._read_us = statistics.median(times)

    @staticmethod
    def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _read(self) -> None:
        torch.sum(self._scratch, dim=0, out=self._sum)

    def sample(self, implementation: Implementation, i: int) -> Callable[[], float]:
        state = implementation.prepare(i)
        wanted = min(1.5 * self.host_us.get(implementation.name, 0.0), MAX_BACKLOG_US)
        for _ in range(max(1, math.ceil(wanted / self._read_us))):
            self._read()
        start, end = self._events()
        start.record()
        implementation.run(state)
        end.record()
        return lambda: 1e3 * start.elapsed_time(end)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)

    def poison(self, numbytes: int) -> None:
        torch.full((max(numbytes, 4) // 4,), math.nan, device=self._device)

    def count(self, implementation: Implementation) -> dict[str, int | None]:
        state = implementation.prepare(1)
        self.settle()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = self._requested("current")
        result = implementation.run(state)
        self.settle()
        peak, kept = self._requested("peak") - before, self._requested("current") - before
        del result, state
        return {
            "host_syncs": count_syncs(implementation),
            "launches": count_launches(implementation),
            "peak_bytes": peak,
            "kept_bytes": kept,
        }

    def _requested(self, which: str) -> int:
        # Requested bytes: allocated blocks may be up to 1 MiB larger.
        return int(torch.cuda.memory_stats(self._device)[f"requested_bytes.all.{which}"])


def count_syncs(implementation: Implementation) -> int:
    """Count the host synchronisations of one call that PyTorch's debug mode detects."""
    state = implementation.prepare(1)
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            implementation.run(state)
        finally:
            torch.cuda.set_sync_debug_mode(previous)
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def count_launches(implementation: Implementation) -> int | None:
    """Count the kernels of one call, without copies and fills; None if the profiler saw none."""
    # Sometimes a profile has no device events, mostly if nothing else is recorded.
    for _ in range(3):
        state = implementation.prepare(1)
        torch.cuda.synchronize()
        with torch.profiler.profile() as profiler:
            implementation.run(state)
            torch.cuda.synchronize()
        kernels = [
            event.name
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            and not event.name.startswith(("Memcpy", "Memset"))
        ]
        if kernels:
            return len(kernels)
    return None


@functools.cache
def clock_for(device: torch.device) -> CpuClock:
    """Return the clock of a device; a process has one, because it holds a large buffer."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def measure(
    key: Key,
    work: Work,
    implementations: Sequence[Implementation],
    *,
    check: Check,
    settings: Settings,
) -> list[Row]:
    """Check, count and time one group.

    An error of another implementation (out of memory, a failing compiler) becomes the problem of
    its row; an error of ours is raised.
    """
    row = functools.partial(Row, key=key, work=work)
    if settings.out_of_time:
        return [row(implementation=i.name, kind=i.kind, problem=LATE) for i in implementations]
    clock = clock_for(settings.device)
    rows: dict[str, Row] = {}
    timed: list[Implementation] = []
    for implementation in implementations:
        made = row(implementation=implementation.name, kind=implementation.kind)
        try:
            problem = gate(implementation, check, clock, work.bytes)
            counts = {} if problem else clock.count(implementation)
        except Exception as error:
            if implementation.kind == "ours":
                raise
            first_line = (str(error).splitlines() or [""])[0]
            problem, counts = f"{type(error).__name__}: {first_line}", {}
        rows[implementation.name] = replace(made, problem=problem, **counts)  # type: ignore[arg-type]
        if problem is None:
            timed.append(implementation)
    for name, figures in sample_rounds(timed, clock, settings.row_seconds * len(timed)).items():
        rows[name] = replace(rows[name], **figures)
    return list(rows.values())


def gate(
    implementation: Implementation, check: Check, clock: CpuClock, poisoned: int
) -> str | None:
    """Check one result, and warm up; returns what is wrong, or None.

    Before the run, ``poisoned`` bytes of free memory are filled with NaN.
    """
    state = implementation.prepare(0)
    clock.poison(poisoned)
    result = implementation.run(state)
    problem = check(implementation, result)
    if problem is not None:
        return f"failed the gate: {problem}"
    del result, state
    clock.warm_up(implementation)
    return None


def sample_rounds(
    implementations: Sequence[Implementation], clock: CpuClock, seconds: float
) -> dict[str, dict[str, Any]]:
    """Sample all in turn for about ``seconds``; returns the timing fields of each row, by name."""
    device: dict[str, list[float]] = {i.name: [] for i in implementations}
    end = time.perf_counter() + seconds
    for i in range(MAX_SAMPLES if implementations else 0):
        pending = [(one.name, clock.sample(one, i)) for one in implementations]
        clock.settle()
        for name, read in pending:
            device[name].append(read())
        if i + 1 >= MIN_SAMPLES and time.perf_counter() > end:
            break
    return {
        name: {
            **dict(zip(("p20_us", "median_us", "p80_us"), spread(times), strict=True)),
            "host_us": clock.host_us.get(name),
            "samples": len(times),
        }
        for name, times in device.items()
    }


def spread(times: Sequence[float]) -> list[float]:
    """Compute 20th percentile, median and 80th percentile."""
    found: list[float] = np.percentile(times, (20, 50, 80)).tolist()
    return found


def rotation(device: torch.device, set_bytes: int) -> int:
    """Return how many input sets of this size to rotate, so that they fill L2 three times."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.ceil(3 * cache / max(set_bytes, 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """The highest rates of the device, measured in this run; rows are compared with them."""

    copy_bytes_per_s: float  # of one large device-to-device copy, bytes read plus bytes written
    flops_per_s: dict[str, float] = field(default_factory=dict)
    """The rate of one large square matrix product, by dtype."""


def measure_ceilings(settings: Settings) -> Ceilings:
    """Time one large copy, and one large matrix product for each dtype."""
    device = settings.device
    cuda = device.type == "cuda"
    clock = clock_for(device)

    def best_us(name: str, run: Callable[[Any], Any], state: object = None) -> float:
        one = Implementation(name=name, kind="floor", prepare=lambda _: state, run=run)
        return float(sample_rounds([one], clock, settings.row_seconds)[name]["median_us"])

    source = torch.rand((2**30 if cuda else 2**22) // 4, device=device)
    target = torch.empty_like(source)
    copy_us = best_us("copy", lambda _: target.copy_(source))
    rates: dict[str, float] = {}
    size = 8192 if cuda else 128
    for dtype in settings.dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        state = (a, b, torch.empty_like(a))
        us = best_us("product", lambda given: torch.mm(*given[:2], out=given[2]), state)
        rates[dtype_name(dtype)] = 2 * size**3 / us * 1e6
    return Ceilings(copy_bytes_per_s=2 * source.nbytes / copy_us * 1e6, flops_per_s=rates)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in :data:`DTYPES`."""
    return next(name for name, each in DTYPES.items() if each == dtype)


def where(device: torch.device, **more: str) -> str:
    """Describe in one line where a table was measured: the environment, and ``more``."""
    found = {**environment(device), **more}
    return ", ".join(f"{name} {value}" for name, value in found.items() if value)


def environment(device: torch.device) -> dict[str, str]:
    """Find hardware, software, commit and date of this run."""
    found = {
        "device": platform.processor() or platform.machine(),
        "driver": "",
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _command("git", "-C", str(FOLDER), "describe", "--always", "--dirty"),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = _nvidia_smi(device, "driver_version")
    return found


STATE = "clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu"


def device_state(device: torch.device) -> dict[str, str]:
    """Ask nvidia-smi for clocks, power and temperature while the device multiplies."""
    found = dict.fromkeys(STATE, "not reported")
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        out = torch.empty_like(a)
        for _ in range(500):  # some 0.7 s, enough for nvidia-smi to answer
            torch.mm(a, a, out=out)
        line = _nvidia_smi(device, *STATE)
        torch.cuda.synchronize(device)
        found |= zip(STATE, filter(None, map(str.strip, line.split(","))), strict=False)
    return found


def _nvidia_smi(device: torch.device, *fields: str) -> str:
    identity = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = f"--query-gpu={','.join(fields)}"
    return _command("nvidia-smi", query, "--format=csv,noheader", identity)


def _command(*command: str) -> str:
    """Return the first line of a command's output; empty if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
