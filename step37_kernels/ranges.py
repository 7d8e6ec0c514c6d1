"""Names the parts of a step in a profiler's timeline, by ranges: ``step37/plan`` and others.

They are there while ``torch.profiler`` records, within ``torch.autograd.profiler.emit_nvtx``, and
for ``nsys`` in a process that is started with ``STEP37_NVTX=1``. Otherwise a part costs a function
call and two comparisons. Traced by ``torch.compile``, the parts of a graph have no ranges; the
operators in it have names of their own there, ``step37::plan`` for one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.autograd import profiler

Part = Literal["decode", "upload", "pixels", "plan", "insert", "gradient"]
"""Of reading pictures (the first three) and of embedding them."""


def _is_nvtx_wanted() -> bool:
    """Whether ``STEP37_NVTX`` asks for ranges of NVTX.

    Raises:
        ValueError: it is set to anything but 0, 1 and nothing.
        RuntimeError: it is 1, and PyTorch is built without NVTX.
    """
    value = os.environ.get("STEP37_NVTX", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"STEP37_NVTX: expected 0 or 1, got {value!r}")
    if value != "1":
        return False
    try:
        torch.cuda.nvtx.mark("step37: the ranges of NVTX are on")
    except RuntimeError as error:
        raise RuntimeError(
            "STEP37_NVTX=1 needs NVTX, which this PyTorch is built without "
            f"({torch.__version__}); unset it"
        ) from error
    return True


_nvtx = _is_nvtx_wanted()
_nothing = contextlib.nullcontext()


def profiled(part: Part) -> AbstractContextManager[Any]:
    """A context whose time a profiler shows as ``step37/`` and the part, if one is attached."""
    if torch.compiler.is_compiling() or not (_nvtx or profiler._is_profiler_enabled):
        return _nothing
    return _range(f"step37/{part}")


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as ranges:
        if _nvtx:
            ranges.enter_context(torch.cuda.nvtx.range(name))
        if profiler._is_profiler_enabled:
            ranges.enter_context(profiler.record_function(name))
        yield
