"""Offers the names of Megatron-Bridge's module ``multimodal_utils``, for code that imports them."""

from step37_data.common.image_entry import IMAGE_ITEM_TYPE, PATCH_ITEM_TYPE  # noqa: F401
from step37_data.preprocess import RopeArgs as RopeArgsFn  # noqa: F401
from step37_data.preprocess import build_image_for_insert, compute_rope_args  # noqa: F401
from step37_kernels.image_insert_embedding import ImageForInsert  # noqa: F401
