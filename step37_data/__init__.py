"""Makes packed batches of pictures and captions for the training of Step-3.7-Flash.

Each name below loads its module when it is first used, so ``import step37_data`` is fast and needs
neither transformers nor megatron.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step37_data.flickr8k_loader import Flickr8kSample as Flickr8kSample
    from step37_data.flickr8k_loader import Step37Flickr8kDataset as Step37Flickr8kDataset
    from step37_data.flickr8k_loader import get_flickr8k_dataset_file as get_flickr8k_dataset_file
    from step37_data.flickr8k_loader import prepare_flickr8k_samples as prepare_flickr8k_samples
    from step37_data.forward_step import ForwardStep as ForwardStep
    from step37_data.images.crops import CropPlan as CropPlan
    from step37_data.images.crops import plan_crops as plan_crops
    from step37_data.images.decode import BrokenImages as BrokenImages
    from step37_data.pack_transform import (
        get_position_id_from_cu_seqlens as get_position_id_from_cu_seqlens,
    )
    from step37_data.pack_transform import pack_samples as pack_samples
    from step37_data.packed_dataloader import MixedPackedDataloader as MixedPackedDataloader
    from step37_data.packing import PackingResult as PackingResult
    from step37_data.packing import pack as pack
    from step37_data.packing import pack_best_fit as pack_best_fit
    from step37_data.pp_media import VLM_PP_MEDIA_KEY as VLM_PP_MEDIA_KEY
    from step37_data.pp_media import chunk_step3_media as chunk_step3_media
    from step37_data.pp_media import chunk_vlm_media as chunk_vlm_media
    from step37_data.pp_media import prepare_vlm_media_for_pp as prepare_vlm_media_for_pp
    from step37_data.pp_media import stage_vlm_media_for_pp as stage_vlm_media_for_pp
    from step37_data.pp_media import wrap_vlm_collate_for_pp as wrap_vlm_collate_for_pp
    from step37_data.prefetch import Prefetcher as Prefetcher
    from step37_data.preprocess import IMAGE_ITEM_TYPE as IMAGE_ITEM_TYPE
    from step37_data.preprocess import PATCH_ITEM_TYPE as PATCH_ITEM_TYPE
    from step37_data.preprocess import ImageForInsert as ImageForInsert
    from step37_data.preprocess import build_image_for_insert as build_image_for_insert
    from step37_data.preprocess import compute_rope_args as compute_rope_args
    from step37_data.preprocess import load_images as load_images
    from step37_data.preprocess import preprocess_packed_batch as preprocess_packed_batch
    from step37_data.provider import Step37Flickr8kSFTDataProvider as Step37Flickr8kSFTDataProvider
    from step37_data.samplers import LoopedSequentialSampler as LoopedSequentialSampler
    from step37_data.samplers import LoopedShuffleSampler as LoopedShuffleSampler
    from step37_data.samplers import WeightedRandomSampler as WeightedRandomSampler
    from step37_data.template import MultimodalSFTSample as MultimodalSFTSample
    from step37_data.template import Step37MultimodalTemplate as Step37MultimodalTemplate

_MODULE_OF = {
    "BrokenImages": "images.decode",
    "CropPlan": "images.crops",
    "Flickr8kSample": "flickr8k_loader",
    "ForwardStep": "forward_step",
    "IMAGE_ITEM_TYPE": "preprocess",
    "ImageForInsert": "preprocess",
    "LoopedSequentialSampler": "samplers",
    "LoopedShuffleSampler": "samplers",
    "MixedPackedDataloader": "packed_dataloader",
    "MultimodalSFTSample": "template",
    "PATCH_ITEM_TYPE": "preprocess",
    "PackingResult": "packing",
    "Prefetcher": "prefetch",
    "Step37Flickr8kDataset": "flickr8k_loader",
    "Step37Flickr8kSFTDataProvider": "provider",
    "Step37MultimodalTemplate": "template",
    "VLM_PP_MEDIA_KEY": "pp_media",
    "WeightedRandomSampler": "samplers",
    "build_image_for_insert": "preprocess",
    "chunk_step3_media": "pp_media",
    "chunk_vlm_media": "pp_media",
    "compute_rope_args": "preprocess",
    "get_flickr8k_dataset_file": "flickr8k_loader",
    "get_position_id_from_cu_seqlens": "pack_transform",
    "load_images": "preprocess",
    "pack": "packing",
    "pack_best_fit": "packing",
    "pack_samples": "pack_transform",
    "plan_crops": "images.crops",
    "prepare_flickr8k_samples": "flickr8k_loader",
    "prepare_vlm_media_for_pp": "pp_media",
    "preprocess_packed_batch": "preprocess",
    "stage_vlm_media_for_pp": "pp_media",
    "wrap_vlm_collate_for_pp": "pp_media",
}

__all__ = sorted(_MODULE_OF)

if not TYPE_CHECKING:  # type checkers read the imports above and reject other names

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
