"""Put the stand-ins where Megatron-Bridge would be, and take them out again."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
PACKAGE = "megatron.bridge.models.stepfun.modelling_step37"
MODEL = f"{PACKAGE}.model"
EMBEDDING = f"{PACKAGE}.image_insert_embedding"
LOSSES = "megatron.bridge.training.losses"


class _Finder(importlib.abc.MetaPathFinder):
    """Answers every import below ``megatron.bridge``."""

    def __init__(self, sources: dict[str, Path]) -> None:
        self.sources = sources

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if name in self.sources:
            return importlib.util.spec_from_file_location(name, self.sources[name])
        if not f"{name}.".startswith("megatron.bridge."):
            return None
        if any(known.startswith(f"{name}.") for known in (*self.sources, f"{PACKAGE}.model")):
            return importlib.machinery.ModuleSpec(name, None, is_package=True)
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@contextmanager
def absent() -> Iterator[None]:
    """Within :func:`installed`: without the stand-ins, for a Bridge that is really there."""
    finders = [f for f in sys.meta_path if isinstance(f, _Finder)]
    stand_ins = {name: sys.modules.pop(name) for name in _imported()}
    for finder in finders:
        sys.meta_path.remove(finder)
    try:
        yield
    finally:
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(stand_ins)
        sys.meta_path[:0] = finders


@contextmanager
def installed(sources: dict[str, Path] | None = None) -> Iterator[None]:
    """Make ``megatron.bridge`` consist of ``sources`` (dotted name → file) only.

    By default all stand-ins. Whatever was imported of a real Bridge comes back afterwards.
    """
    if sources is None:
        sources = {
            MODEL: HERE / "model.py",
            EMBEDDING: HERE / "image_insert_embedding.py",
            LOSSES: HERE / "losses.py",
        }
    import megatron

    finder = _Finder(sources)
    before = {name: sys.modules.pop(name) for name in _imported()}
    attribute = vars(megatron).pop("bridge", None)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(before)
        vars(megatron).pop("bridge", None)
        if attribute is not None:
            megatron.bridge = attribute


def _imported() -> list[str]:
    return [n for n in sys.modules if n == "megatron.bridge" or n.startswith("megatron.bridge.")]
