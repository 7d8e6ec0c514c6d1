"""Names and counts of the tokens that stand for pictures in the text of Step-3.7."""

from __future__ import annotations

IMAGE_PLACEHOLDER = "<image>"
MULTICROP_IMAGE_PLACEHOLDER = "<@image@>"
MULTICROP_PATCH_PLACEHOLDER = "<#image#>"
IMAGE_TOKEN = "<im_patch>"
IMAGE_START_TOKEN = "<im_start>"
IMAGE_END_TOKEN = "<im_end>"
PATCH_START_TOKEN = "<patch_start>"
PATCH_NEWLINE_TOKEN = "<patch_newline>"
PATCH_END_TOKEN = "<patch_end>"
IMAGE_TOKEN_COUNT = 169
PATCH_TOKEN_COUNT = 81

# The second element of an entry of ``image_paths``.
IMAGE_ITEM_TYPE = 0
PATCH_ITEM_TYPE = 1
