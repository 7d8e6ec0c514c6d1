"""Makes packs from WebDataset shards, through Megatron-Energon (extra ``energon``)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step37_energon.task_encoder import Step37TaskEncoder as Step37TaskEncoder

__all__ = ["Step37TaskEncoder"]


if not TYPE_CHECKING:  # type checkers read the import above and reject other names

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from step37_energon import task_encoder  # writing shards needs no Energon

        return task_encoder.Step37TaskEncoder
