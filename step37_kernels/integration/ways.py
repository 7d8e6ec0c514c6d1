"""Which way each part of the embedding takes, in plain words: for the log, and for ``report``.

Nothing is decided here. The functions ask those that decide in a forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from step37_kernels.dispatch import Impl, check_kernel_dtype, use_triton
from step37_kernels.lookup import fusion_target

ROWS = 1521
"""Feature rows of a pack of 2048 tokens with nine pictures of 169 rows."""


@dataclass(frozen=True, slots=True)
class Way:
    """The way that one part takes, and why.

    Attributes:
        how: one word or two; ``"error"`` where a forward would raise.
        why: the reason, what else there is to say, or the error's message.
    """

    how: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.how} ({self.why})" if self.why else self.how


class Place(NamedTuple):
    """Where tensors are, and in what; None where there are none."""

    device: torch.device | None
    dtype: torch.dtype | None

    @classmethod
    def of(cls, module: Any) -> Place:
        """Of the module's first parameter; of a callable that is no module nothing is known."""
        tensor = next(module.parameters(), None) if isinstance(module, nn.Module) else None
        return cls(None, None) if tensor is None else cls(tensor.device, tensor.dtype)

    def __str__(self) -> str:
        if self.device is None:
            return "unknown: no parameters"
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """Which way each part of an embedding takes; what ``how`` of each may be.

    Attributes:
        words: ``"looked up"`` in the insertion, or ``"called"``: the language embedding.
        plan: ``"Triton"`` or ``"PyTorch"``.
        projection: ``"Triton"``, with the tile; ``"library"``, whose product one more launch puts
            in place; ``"PyTorch"``; or ``"called"``: the projector, as a module.
        projector_gradient, words_gradient: ``"main_grad"``, ``"autograd"`` or ``"none"``; of a
            projector that is called ``"its own"``.
        layout: ``"whole"`` (every rank has the sequence) or ``"shared"``.
        text_only_gradient: ``"zeros"`` or ``"none"``, for the projector.
        words_place, projector_place: device and dtype.
    """

    words: Way
    words_gradient: Way
    plan: Way
    projection: Way
    projector_gradient: Way
    layout: Way
    text_only_gradient: Way
    words_place: Place
    projector_place: Place

    def items(self) -> dict[str, str]:
        """What to call each part, and its way."""
        names = {
            "words_place": "words on",
            "projector_place": "projector on",
            "projector_gradient": "projector gradient",
            "words_gradient": "words gradient",
            "layout": "sequence",
            "text_only_gradient": "text-only batch",
        }
        return {
            names.get(field.name, field.name): str(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }

    def __str__(self) -> str:
        return "; ".join(f"{name}: {way}" for name, way in self.items().items())


def way_of(decide: Callable[[], Way]) -> Way:
    """What ``decide`` says; where it raises as a forward would, the message."""
    try:
        return decide()
    # The last two are PyTorch's: of a device that is not there, of tensors without memory.
    except (ValueError, ImportError, RuntimeError, AssertionError) as error:
        return Way("error", str(error))


def way_of_launch(impl: Impl, device: torch.device) -> Way:
    """Of what is computed from tensors on ``device``."""
    if use_triton(impl, device):
        return Way("Triton")
    return Way("PyTorch", f"impl={impl!r}, on {device}")


def way_of_product(weight: Tensor, impl: Impl, rows: int) -> Way:
    """Of a projector that its weight stands for.

    Raises:
        ValueError: the kernels do not compute in the weight's dtype, or ``impl`` cannot run there.
    """
    way = way_of_launch(impl, weight.device)
    if way.how != "Triton":
        return way
    check_kernel_dtype(weight, "weight")
    if isinstance(weight, FakeTensor):
        return Way("Triton", "a tensor without memory does not say with which tile")
    from step37_kernels.ops.tiles import tile_of

    tile = tile_of(rows, weight)
    if tile.library:
        return Way("library", "no tile of ours for this GPU, dtype or alignment")
    return Way("Triton", f"tile {tile} for {rows} rows")


def way_of_gradient(parameter: Tensor, name: str, why_not_fused: str | None) -> Way:
    """Of a parameter that is read by the insertion itself.

    Raises:
        ValueError: it is to be fused, and has no ``main_grad``.
    """
    if not parameter.requires_grad:
        return Way("none", "it is frozen")
    if fusion_target(parameter, name, why_not_fused is None) is not None:
        return Way("main_grad")
    return Way("autograd", why_not_fused or "")
