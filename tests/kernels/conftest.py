"""Shared by the kernel tests: the device, its implementations, poisoned memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from step37_kernels.count_watch import count_watch
from tests import ptx

if ptx.ARCHITECTURE:  # these run in processes of their own, or launch nothing: as without it
    collect_ignore = [
        "test_imports.py",
        "compiled/test_launch.py",
        "pixels/test_pixels_compile.py",
        "pixels/test_pixels_pillow_versions.py",
        "test_reference.py",
        "compiled/test_resources.py",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where PTX is interpreted, leave out tests that launch no kernel in their process.

    ``make test`` makes the same checks.
    """
    if not ptx.ARCHITECTURE:
        return
    left_out = [item for item in items if launches_nothing(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def launches_nothing(item: Any) -> bool:
    """Whether a test is marked so, or has a parameter by which PyTorch computes everything."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    by_pytorch = parameters.get("impl") == "torch" or parameters.get("triton") is False
    return by_pytorch or item.get_closest_marker("no_launch") is not None


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: compiled on the GPU, else interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def own_count_watch() -> None:
    """On CUDA a later forward warns about a mismatch: one of the same test, or nobody."""
    count_watch._pending.clear()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN or a huge integer, so that an element nobody writes shows up."""
    real_empty, real_empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor, pin_memory: bool = False) -> torch.Tensor:
        # Host staging buffers are filled by copies, and writing them here would hide a sync. Known
        # by the argument: is_pinned() asks the driver, also while a graph is captured.
        if pin_memory or tensor.requires_grad:
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: poison(real_empty(*a, **k), k.get("pin_memory", False))
    )
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(real_empty_like(*a, **k)))
