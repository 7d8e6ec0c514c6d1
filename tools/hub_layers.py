"""Layers for the kernel hub: the ``kernels`` package replaces a module's ``forward`` by theirs.

As ``kernels`` requires, a layer has only a ``forward``, in which ``self`` is the replaced module.
``tools/kernel_hub.py`` copies this file to ``layers.py``.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from step37_kernels.image_insert_embedding import ImageInsertEmbedding as _Fused
from step37_kernels.pixels.normalize import clip_normalize

# One for each replaced module; it has no parameters, and is freed with the module.
_fused: weakref.WeakKeyDictionary[nn.Module, _Fused] = weakref.WeakKeyDictionary()


def _fused_for(module: Any) -> _Fused:
    fused = _fused.get(module)
    if fused is None:
        projector, owner = module.align_projector, weakref.proxy(module)
        with torch.device("meta"):
            fused = _Fused(
                lambda **given: owner._language_embedding(**given),
                projector.in_features,
                projector.out_features,
                projector_bias=projector.bias is not None,
            )
        _fused[module] = fused
    # Read each time, since it may have been replaced.
    fused.align_projector = module.align_projector
    return fused


class ImageInsertEmbedding(nn.Module):
    """Runs the fused path in the ``ImageInsertEmbedding`` of Step-3.7, of any class."""

    has_backward = True

    def forward(
        self, input_ids: Tensor, images: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> Tensor:
        """Return word embeddings ``[S, B, H]`` with the projected features inserted."""
        output: Tensor = _fused_for(self)(input_ids, images, position_ids, **kwargs)
        return output


class ClipNormalize(nn.Module):
    """Normalises uint8 ``[N, H, W, 3]`` with CLIP's constants to bfloat16 ``[N, 3, H, W]``."""

    has_backward = False

    def forward(self, pixels: Tensor) -> Tensor:
        """Return ``(pixels / 255 - mean) / std``, computed in fp32 and rounded, bit for bit."""
        return clip_normalize(pixels)
