"""Fused multimodal embedding of Step-3.7-Flash: Triton kernels with a PyTorch reference."""

from step37_kernels.image_insert_embedding import ImageForInsert, ImageInsertEmbedding
from step37_kernels.insert import project_and_insert
from step37_kernels.pixels.normalize import clip_normalize
from step37_kernels.pixels.ragged import Crop, RaggedImages
from step37_kernels.pixels.resize import resize_clip_normalize, resize_uint8
from step37_kernels.plan import InsertPlan, plan_insert, plan_placeholders

__version__ = "0.1.0"

__all__ = [
    "Crop",
    "ImageForInsert",
    "ImageInsertEmbedding",
    "InsertPlan",
    "RaggedImages",
    "clip_normalize",
    "plan_insert",
    "plan_placeholders",
    "project_and_insert",
    "resize_clip_normalize",
    "resize_uint8",
]
