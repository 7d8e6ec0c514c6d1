"""Lists the subjects of ``python -m bench``, the things that it can measure: :data:`SUBJECTS`.

A subject is a function of :class:`bench.harness.Settings` that yields groups of rows
(``list[Row]``) or tables (:class:`bench.report.Table`). Its module is imported when it runs, not
before, so that each subject needs only the packages that it uses itself.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from bench.harness import Row, Settings
from bench.report import Table
from bench.shapes import AUTOMODEL, SHAPES

Run: TypeAlias = Callable[[Settings], Iterator[list[Row] | Table]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option of the command line that only one subject has: ``--name VALUE``.

    The subject finds its value in ``settings.options[name]``.
    """

    name: str
    help: str
    type: Callable[[str], Any] = int
    default: Any
    quick: Any  # the default of a quick run
    several: bool = False  # takes any number of values; the value is a list


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One thing that can be measured, and what is needed to run it."""

    module: str
    function: str = "run"
    shapes: tuple[str, ...] = ()
    """Names of the shapes measured by default; empty if figures do not depend on shapes."""
    shapes_together: bool = False  # in one process; else in one process for each shape
    needs: tuple[str, ...] = ()
    """Packages needed besides torch, Triton and NumPy, by the name that is imported."""
    rows: bool = False
    """Whether it yields groups of rows, which are compared with the ceilings; else tables."""
    needs_gpu: bool = False
    on_request: bool = False  # runs only if it is named
    row_seconds: float = 0.25  # timing of one row or figure; a fifth of it in a quick run
    options: tuple[Option, ...] = ()

    def missing(self) -> list[str]:
        """List the packages of :attr:`needs` that are not installed."""
        return [name for name in self.needs if not installed(name)]

    def load(self) -> Run:
        """Import the module; returns the function that measures."""
        run: Run = getattr(importlib.import_module(self.module), self.function)
        return run


def installed(name: str) -> bool:
    """Whether a module can be found, without importing it (its parents are imported)."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


DATA = ("PIL", "transformers", "jinja2", "tqdm")
STEPS = Option(name="steps", help="steps to measure the wait over", default=20, quick=5)
ROUNDS = Option(name="rounds", help="rounds of 200 calls each", default=15, quick=5)
LARGEST = Option(name="largest", help="schedule up to 10^N samples", default=7, quick=5)
SAMPLES = Option(name="samples", help="samples in the shards", default=20_000, quick=2_000)
WORKERS = Option(name="workers", help="worker processes that draw", default=2, quick=2)
MEASURED = Option(
    name="measured", help="JSON files of earlier runs, shown beside what is predicted",
    type=str, default=(), quick=(), several=True,
)  # fmt: skip

SUBJECTS = {
    "plan": Subject(module="bench.subjects.plan", shapes=tuple(SHAPES), rows=True, needs_gpu=True),
    "step": Subject(
        module="bench.subjects.step", shapes=("flickr8k", "long", "multicrop"), needs=("PIL",),
        rows=True, needs_gpu=True,
    ),
    "insert": Subject(
        module="bench.subjects.insert", shapes=tuple(SHAPES), rows=True, needs_gpu=True,
    ),
    "embedding": Subject(
        module="bench.subjects.embedding", shapes=("flickr8k", "long", "huge", "multicrop"),
        rows=True,
    ),
    "automodel": Subject(module="bench.subjects.automodel", rows=True, needs_gpu=True),
    "normalize": Subject(
        module="bench.subjects.pixel_kernels", function="run_normalize", needs=("PIL",),
        rows=True, needs_gpu=True,
    ),
    "resize": Subject(
        module="bench.subjects.pixel_kernels", function="run_resize", needs=("PIL",),
        rows=True, needs_gpu=True,
    ),
    "host": Subject(module="bench.subjects.host", options=(ROUNDS,)),
    "pixels": Subject(
        module="bench.subjects.pixels", function="run_pixels", needs=("PIL",), row_seconds=2.0,
        options=(STEPS,),
    ),
    "multicrop": Subject(
        module="bench.subjects.pixels", function="run_multicrop", needs=("PIL",), row_seconds=4.0,
    ),
    "data": Subject(module="bench.subjects.data", needs=DATA, options=(LARGEST,)),
    "shards": Subject(
        module="bench.subjects.shards", needs=("megatron.energon", *DATA), on_request=True,
        options=(SAMPLES, WORKERS),
    ),
    "predict": Subject(
        module="bench.predict", on_request=True, options=(MEASURED,), shapes_together=True,
        shapes=(*SHAPES, AUTOMODEL.name, *(f"images-{count}" for count in range(1, 17))),
    ),
    "tune": Subject(
        module="bench.subjects.tune", shapes=("images-1", "images-4", "images-9", "long"),
        rows=True, needs_gpu=True, on_request=True,
    ),
}  # fmt: skip
"""Every subject by its name on the command line, in the order in which they run."""
