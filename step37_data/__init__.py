"""Packed Flickr8k batches for Step-3.7-Flash: download, tokenise, pack, decode.

The names below load their module on first use, so that ``import step37_data`` costs nothing and
needs neither transformers nor megatron.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "Flickr8kSample": "flickr8k_loader",
    "Step37Flickr8kDataset": "flickr8k_loader",
    "get_flickr8k_dataset_file": "flickr8k_loader",
    "prepare_flickr8k_samples": "flickr8k_loader",
    "MultimodalSFTSample": "template",
    "Step37MultimodalTemplate": "template",
    "LoopedSequentialSampler": "samplers",
    "LoopedShuffleSampler": "samplers",
    "WeightedRandomSampler": "samplers",
    "PackingResult": "packing",
    "pack": "packing",
    "pack_best_fit": "packing",
    "MixedPackedDataloader": "packed_dataloader",
    "CropPlan": "images.crops",
    "plan_crops": "images.crops",
    "get_position_id_from_cu_seqlens": "pack_transform",
    "pack_samples": "pack_transform",
    "IMAGE_ITEM_TYPE": "preprocess",
    "PATCH_ITEM_TYPE": "preprocess",
    "build_image_for_insert": "preprocess",
    "compute_rope_args": "preprocess",
    "load_images": "preprocess",
    "preprocess_packed_batch": "preprocess",
    "Step37Flickr8kSFTDataProvider": "provider",
    "VLM_PP_MEDIA_KEY": "pp_media",
    "chunk_step3_media": "pp_media",
    "chunk_vlm_media": "pp_media",
    "prepare_vlm_media_for_pp": "pp_media",
    "stage_vlm_media_for_pp": "pp_media",
    "wrap_vlm_collate_for_pp": "pp_media",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        from step37_data.extras import how_to_get

        needed = how_to_get(error)
        if needed is None:
            raise
        raise ModuleNotFoundError(f"{__name__}.{name} {needed}", name=error.name) from error


def __dir__() -> list[str]:
    return __all__
