"""Fused multimodal embedding of Step-3.7-Flash: Triton kernels with a PyTorch reference."""

from step37_kernels.image_insert_embedding import ImageForInsert, ImageInsertEmbedding
from step37_kernels.insert import InsertPlan, plan_insert, project_and_insert

__all__ = [
    "ImageForInsert",
    "ImageInsertEmbedding",
    "InsertPlan",
    "plan_insert",
    "project_and_insert",
]
