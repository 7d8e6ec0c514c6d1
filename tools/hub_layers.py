"""The layers of the kernel hub's folder: what ``kernels`` puts in place of a module's ``forward``.

As ``kernels`` asks, a layer has a ``forward`` and nothing else; ``self`` is the module replaced.
``tools/kernel_hub.py`` copies this file to ``layers.py``.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from step37_kernels.image_insert_embedding import ImageInsertEmbedding as _Fused
from step37_kernels.pixels.normalize import clip_normalize

# One for each module replaced; it holds no parameter of its own, and goes with the module.
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
    # Asked for each time: somebody may have put another one there.
    fused.align_projector = module.align_projector
    return fused


class ImageInsertEmbedding(nn.Module):
    """The fused path in the ``ImageInsertEmbedding`` of Step-3.7, whatever class it is."""

    has_backward = True

    def forward(
        self, input_ids: Tensor, images: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> Tensor:
        """Word embeddings ``[S, B, H]`` with the projected features in their places."""
        output: Tensor = _fused_for(self)(input_ids, images, position_ids, **kwargs)
        return output


class ClipNormalize(nn.Module):
    """uint8 ``[N, H, W, 3]`` to CLIP-normalised bfloat16 ``[N, 3, H, W]``."""

    has_backward = False

    def forward(self, pixels: Tensor) -> Tensor:
        """Bit for bit ``(pixels / 255 - mean) / std`` in fp32, rounded."""
        return clip_normalize(pixels)
