"""Names the tokens that represent pictures in texts of Step-3.7, and loads the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step37_data.common.image_entry import IMAGE_TOKEN_COUNT, PATCH_TOKEN_COUNT

IMAGE_PLACEHOLDER = "<image>"
MULTICROP_IMAGE_PLACEHOLDER = "<@image@>"
MULTICROP_PATCH_PLACEHOLDER = "<#image#>"
IMAGE_TOKEN = "<im_patch>"
IMAGE_START_TOKEN = "<im_start>"
IMAGE_END_TOKEN = "<im_end>"
PATCH_START_TOKEN = "<patch_start>"
PATCH_NEWLINE_TOKEN = "<patch_newline>"
PATCH_END_TOKEN = "<patch_end>"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""The files of a tokenizer's folder."""


@dataclass(kw_only=True)
class ImageTokens:
    """The names of the image tokens, and how many each picture takes.

    Attributes:
        image_token_count: rows of a full image.
        patch_token_count: rows of a crop.
        image_token: the token for each row of an image or a crop.
        image_start_token, image_end_token: the tokens before and after a full image.
        patch_start_token, patch_end_token: the tokens before and after a crop.
    """

    image_token_count: int = IMAGE_TOKEN_COUNT
    patch_token_count: int = PATCH_TOKEN_COUNT
    image_token: str = IMAGE_TOKEN
    image_start_token: str = IMAGE_START_TOKEN
    image_end_token: str = IMAGE_END_TOKEN
    patch_start_token: str = PATCH_START_TOKEN
    patch_end_token: str = PATCH_END_TOKEN

    def token_runs(self, newline_mask: Sequence[bool]) -> list[tuple[str, int]]:
        """Return the tokens of a picture: those of its crops row by row, then of the full image.

        Args:
            newline_mask: for each crop, whether a newline follows it (``CropPlan``).

        Returns:
            ``(token, how often in a row)``; two crops side by side, without the end, are
            ``<patch_start>`` 1, ``<im_patch>`` 81, ``<patch_end>`` 1, ``<patch_start>`` 1, …
        """

        def framed(start: str, rows: int, end: str) -> list[tuple[str, int]]:
            return [(start, 1), (self.image_token, rows), (end, 1)]

        image = framed(self.image_start_token, self.image_token_count, self.image_end_token)
        crop = framed(self.patch_start_token, self.patch_token_count, self.patch_end_token)
        runs: list[tuple[str, int]] = []
        for newline in newline_mask:
            runs += [*crop, (PATCH_NEWLINE_TOKEN, 1)] if newline else crop
        return runs + image


def load_tokenizer(path: str) -> Any:
    """Load a tokenizer that has a chat template; its remote code is never run.

    Args:
        path: a folder, or the id of a model on the hub.

    Raises:
        ValueError: there is no tokenizer, or it has no chat template. The hub is asked only for
            names such as ``owner/model``; any other path that is no folder is an error at once.
    """
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():
        raise ValueError(
            f"tokenizer_path: there is no folder {path!r}; expected one with "
            f"{list(TOKENIZER_FILES)}"
        )
    # Imported here: it takes seconds, and reading packs does not need it.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of many types: tokenizers raises Exception itself
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        missing = [name for name in TOKENIZER_FILES if not Path(path, name).is_file()]
        here = f"it lacks {missing}" if Path(path).is_dir() else "there is no folder; tried the hub"
        told = f"no tokenizer could be read from {path!r} ({here}; {reason})"
        raise ValueError(f"tokenizer_path: {told}") from error
    if not tokenizer.chat_template:
        wanted = "expected chat_template.jinja, or chat_template in tokenizer_config.json"
        raise ValueError(f"tokenizer_path: {path!r} has no chat template: {wanted}")
    return tokenizer
