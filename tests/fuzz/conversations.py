"""Conversations of pieces of special tokens: as tokenising every prefix, or an error."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from step37_data.template import Step37MultimodalTemplate
from tests.data.text.test_template import TOKENIZER, slow_template
from tests.data.text.test_template_errors import unflagged_delimiter

PIECES = ("<", "|", "im_", "start", "end", "|>", ">", "<im_", "<|im_", "image", "<image>", "\n",
          "<im_start>", "<|im_end|>", "＜", "｜", "＞", "ｉｍ＿", " ", "a cat", "é", "</think>",
          "<think>", "\ud83d", "<@image@>", "<#image#>", "<im_end>", "<patch_start>",
          "<patch_end>", "＜｜im_start｜＞", "＜|im_end|＞user", "")  # fmt: skip


@functools.cache
def templates() -> tuple[Step37MultimodalTemplate, ...]:
    """With the tokenizer as it is, and with a normaliser that makes delimiters of other letters."""
    with tempfile.TemporaryDirectory() as folder:
        paths = str(TOKENIZER), unflagged_delimiter(Path(folder), {"type": "NFKC"})
        return tuple(Step37MultimodalTemplate(tokenizer_path=path) for path in paths)


def case(rng: np.random.Generator, folder: Path) -> None:
    del folder
    template = templates()[int(rng.integers(2))]

    def text() -> str:
        most = 2 if rng.random() < 0.7 else 6
        return "".join(rng.choice(PIECES, int(rng.integers(0, most))))

    def content() -> Any:
        if rng.random() < 0.6:
            return text()
        kinds = rng.integers(0, 3, int(rng.integers(1, 4)))
        return [
            text() if kind == 0 else {"type": "text", ("text", "value")[kind - 1]: text()}
            for kind in kinds
        ]

    messages: list[dict[str, Any]] = [{"role": "user", "content": content()}]
    for _ in range(int(rng.integers(0, 3))):
        role = str(rng.choice(["user", "assistant", "tool", "system"]))
        messages.append({"role": role, "content": content()})
    messages.append({"role": "assistant", "content": content()})
    placeholders = str(messages).count("<image>") + str(messages).count("<@image@>")
    images: list[Any] = [f"{n}.jpg" for n in range(placeholders)]
    images += [(f"{n}c.jpg", 1) for n in range(str(messages).count("<#image#>"))]
    try:
        sample = template({"conversations": messages, "images": images})
    except ValueError:
        return
    tokens, mask = slow_template(template.tokenizer, messages)
    assert sample["tokens"].tolist() == tokens
    assert sample["loss_mask"].tolist() == mask
    # As many turns as with texts that could not begin one.
    plain = [{**message, "content": "x"} for message in messages]
    delimiter = template.tokenizer.convert_tokens_to_ids("<|im_start|>")
    wanted = Counter(slow_template(template.tokenizer, plain)[0])[delimiter]
    assert tokens.count(delimiter) == wanted
    starts = template.img_start_token_id, template.patch_start_token_id
    assert sum(map(tokens.count, starts)) == len(images)
