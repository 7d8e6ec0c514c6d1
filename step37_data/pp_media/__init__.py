"""Media of a pipeline-parallel model, which follow their samples into the microbatches.

:mod:`~step37_data.pp_media.chunks` cuts them, :mod:`~step37_data.pp_media.stage` puts them where
the model looks for them.
"""

from step37_data.pp_media.chunks import (
    _VLM_MEDIA_KEYS,  # noqa: F401
    _select_image_grid,  # noqa: F401
    chunk_step3_media,
    chunk_vlm_media,
    prepare_vlm_media_for_pp,
    wrap_vlm_collate_for_pp,
)
from step37_data.pp_media.stage import VLM_PP_MEDIA_KEY, stage_vlm_media_for_pp

__all__ = [
    "VLM_PP_MEDIA_KEY",
    "chunk_step3_media",
    "chunk_vlm_media",
    "prepare_vlm_media_for_pp",
    "stage_vlm_media_for_pp",
    "wrap_vlm_collate_for_pp",
]
