"""Triton kernels that fuse the multimodal embedding of Step-3.7-Flash, with a PyTorch reference.

Each name below loads its module when it is first used, so ``import step37_kernels`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step37_kernels.image_insert_embedding import ImageForInsert as ImageForInsert
    from step37_kernels.image_insert_embedding import ImageInsertEmbedding as ImageInsertEmbedding
    from step37_kernels.insert import embed_project_and_insert as embed_project_and_insert
    from step37_kernels.insert import project_and_insert as project_and_insert
    from step37_kernels.integration.report import ModuleReport as ModuleReport
    from step37_kernels.integration.report import Report as Report
    from step37_kernels.integration.report import report as report
    from step37_kernels.pixels.normalize import clip_normalize as clip_normalize
    from step37_kernels.pixels.ragged import Crop as Crop
    from step37_kernels.pixels.ragged import RaggedImages as RaggedImages
    from step37_kernels.pixels.resize import resize_clip_normalize as resize_clip_normalize
    from step37_kernels.pixels.resize import resize_uint8 as resize_uint8
    from step37_kernels.plan import InsertPlan as InsertPlan
    from step37_kernels.plan import plan_insert as plan_insert
    from step37_kernels.plan import plan_placeholders as plan_placeholders

__version__ = "0.1.0"

_MODULE_OF = {
    "Crop": "pixels.ragged",
    "ImageForInsert": "image_insert_embedding",
    "ImageInsertEmbedding": "image_insert_embedding",
    "InsertPlan": "plan",
    "ModuleReport": "integration.report",
    "RaggedImages": "pixels.ragged",
    "Report": "integration.report",
    "clip_normalize": "pixels.normalize",
    "embed_project_and_insert": "insert",
    "plan_insert": "plan",
    "plan_placeholders": "plan",
    "project_and_insert": "insert",
    "report": "integration.report",
    "resize_clip_normalize": "pixels.resize",
    "resize_uint8": "pixels.resize",
}

__all__ = sorted(_MODULE_OF)


if not TYPE_CHECKING:  # type checkers read the imports above and reject other names

    def __getattr__(name: str) -> Any:
        module = _MODULE_OF.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
