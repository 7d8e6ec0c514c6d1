"""The tokenizer of a folder or of the hub, or an error that says what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def load_tokenizer(path: str) -> Any:
    """The tokenizer of ``path``, with a chat template; its remote code is never run.

    Args:
        path: a folder, or the id of a model on the hub.

    Raises:
        ValueError: there is no tokenizer, or it has no chat template.
    """
    # Imported here: transformers takes seconds, and reading packs needs none of it.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, and of tokenizers Exception itself
        reason = " ".join(str(error).split())
        raise ValueError(
            f"tokenizer_path: {_what_is_there(path)} ({type(error).__name__}: {reason})"
        ) from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer_path: the tokenizer in {path!r} has no chat template: expected "
            "chat_template.jinja, or chat_template in tokenizer_config.json"
        )
    return tokenizer


def _what_is_there(path: str) -> str:
    folder = Path(path)
    if not folder.is_dir():
        return f"there is no folder {path!r} here, and no tokenizer could be read from the hub"
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        return f"no tokenizer could be read from {path!r}, which lacks {', '.join(missing)}"
    return f"no tokenizer could be read from {path!r}"
