"""Packed Flickr8k batches for Step-3.7-Flash: download, tokenise, pack, decode.

The names below load their module on first use, so that ``import step37_data`` costs nothing and
needs neither transformers nor megatron.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES_OF = {
    "flickr8k_loader": "Flickr8kSample Step37Flickr8kDataset get_flickr8k_dataset_file "
    "prepare_flickr8k_samples",
    "forward_step": "ForwardStep",
    "images.crops": "CropPlan plan_crops",
    "images.decode": "BrokenImages",
    "pack_transform": "get_position_id_from_cu_seqlens pack_samples",
    "packed_dataloader": "MixedPackedDataloader",
    "packing": "PackingResult pack pack_best_fit",
    "pp_media": "VLM_PP_MEDIA_KEY chunk_step3_media chunk_vlm_media prepare_vlm_media_for_pp "
    "stage_vlm_media_for_pp wrap_vlm_collate_for_pp",
    "prefetch": "Prefetcher",
    "preprocess": "IMAGE_ITEM_TYPE PATCH_ITEM_TYPE ImageForInsert build_image_for_insert "
    "compute_rope_args load_images preprocess_packed_batch",
    "provider": "Step37Flickr8kSFTDataProvider",
    "samplers": "LoopedSequentialSampler LoopedShuffleSampler WeightedRandomSampler",
    "template": "MultimodalSFTSample Step37MultimodalTemplate",
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    except ModuleNotFoundError as error:
        from step37_data.common.extras import how_to_get

        needed = f"{__name__}.{name} {how_to_get(error)}"
        raise ModuleNotFoundError(needed, name=error.name) from error


def __dir__() -> list[str]:
    return __all__
