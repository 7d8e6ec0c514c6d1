"""The messages of a conversation: what each may hold, and the texts in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def checked_role(number: int, message: Any) -> str:
    """The role of message ``number``.

    Raises:
        ValueError: it is no mapping, has no role, or a ``loss_mask`` other than 0 and 1.
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"conversations[{number}]: expected a message, got {message!r}")
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"conversations[{number}]: expected a role, got {role!r}")
    loss_mask = message.get("loss_mask", 1)
    if loss_mask not in (0, 1):
        raise ValueError(
            f"conversations[{number}] ({role}): expected a loss_mask of 0 or 1, got {loss_mask!r}"
        )
    return role


def map_texts(content: Any, change: Callable[[str, str], str], where: str) -> tuple[Any, list[str]]:
    """``content`` with ``change`` applied to its texts, and the texts as they were.

    The text is a string, or the text parts of a list.

    Raises:
        ValueError: it is neither of the two, and not None; or a part is no string and no mapping.
    """
    if isinstance(content, str):
        return change(content, where), [content]
    if content is None:
        return None, []
    if not isinstance(content, list):
        raise ValueError(f"{where}: expected a string or a list of parts, got {content!r}")
    parts: list[Any] = []
    texts: list[str] = []
    for number, part in enumerate(content):
        spot = f"{where} part {number}"
        if isinstance(part, str):
            parts.append(change(part, spot))
            texts.append(part)
        elif not isinstance(part, Mapping):
            raise ValueError(f"{spot}: expected a string or a mapping, got {part!r}")
        else:
            keys = ("text", "value") if part.get("type") == "text" else ()
            of_part = {key: part[key] for key in keys if isinstance(part.get(key), str)}
            parts.append({**part, **{key: change(text, spot) for key, text in of_part.items()}})
            texts += of_part.values()
    return parts, texts


def strings(value: Any) -> Iterator[str]:
    """Every string inside nested lists and dictionaries, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings(inner)
