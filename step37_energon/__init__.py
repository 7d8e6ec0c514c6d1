"""Make packs from WebDataset shards, through Megatron-Energon (extra ``energon``)."""

from typing import Any

__all__ = ["Step37TaskEncoder"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from step37_energon import task_encoder  # shards are written without Energon

    return task_encoder.Step37TaskEncoder
