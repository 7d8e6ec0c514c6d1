"""Compiled kernels on a machine without a GPU: an interpreter of the PTX that Triton writes.

``STEP37_TEST_PTX=sm_90`` makes the tests compile the kernels for that architecture, instead of
handing them to Triton's interpreter, and run what came out: the layouts, the shared memory, the
asynchronous copies and the tensor-core instructions of the code that a GPU would be given. What it
cannot see: time, and threads of a block that need a barrier and have none (they run in lockstep).
"""

from __future__ import annotations

import os

ARCHITECTURE = os.environ.get("STEP37_TEST_PTX")
"""``sm_90`` and the like, or None: kernels run as they do without this package."""


def install_if_asked() -> None:
    """Let this process's kernels run so; before the first launch."""
    if ARCHITECTURE:
        from tests.ptx.driver import install

        install(ARCHITECTURE)
