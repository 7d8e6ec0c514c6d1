"""Packs from WebDataset shards, through Megatron-Energon (extra ``energon``)."""

from step37_data.energon.task_encoder import Step37TaskEncoder

__all__ = ["Step37TaskEncoder"]
