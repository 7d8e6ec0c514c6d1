"""Checks the messages of a conversation: their form, and that no text spells a reserved token."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from step37_data.text.tokens import IMAGE_PLACEHOLDER

CAPTION_PROMPT = "Describe this image in one sentence."
"""The default prompt: the user's question about a picture that has a caption."""


def caption_dialogue(caption: str, prompt: str) -> list[dict[str, str]]:
    """Make a conversation of a caption: the user shows a picture and asks, the assistant answers.

    Args:
        caption: the answer.
        prompt: the user's text, after the picture.
    """
    return [
        {"role": "user", "content": f"{IMAGE_PLACEHOLDER}\n{prompt}"},
        {"role": "assistant", "content": caption},
    ]


def checked_role(number: int, message: Any) -> str:
    """Check message ``number``; returns its role.

    Raises:
        ValueError: it is no mapping, has no role, has a ``loss_mask`` other than 0 and 1, or a
            ``reasoning_effort`` that is no string.
    """
    where = f"conversations[{number}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected a message, got {message!r}")
    role, loss_mask = message.get("role"), message.get("loss_mask", 1)
    if not isinstance(role, str):
        raise ValueError(f"{where}: expected a role, got {role!r}")
    if loss_mask not in (0, 1):
        raise ValueError(f"{where} ({role}): expected a loss_mask of 0 or 1, got {loss_mask!r}")
    if not isinstance(effort := message.get("reasoning_effort"), str | None):
        raise ValueError(f"{where} ({role}): expected a reasoning_effort as text, got {effort!r}")
    return role


def map_texts(content: Any, change: Callable[[str, str], str], where: str) -> tuple[Any, list[str]]:
    """Apply ``change`` to the texts of ``content``; returns the new content and the old texts.

    Texts are ``content`` itself, if it is a string, or the text parts of a list.

    Raises:
        ValueError: ``content`` is no string, no list and not None, or a part is no string and no
            mapping.
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
    """Yield every string inside nested lists and dictionaries, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings(list(value.items()))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings(inner)


class ReservedTokens:
    """Refuses texts that spell reserved tokens: those that delimit turns and pictures.

    Args:
        reserved: the tokens as text.
        vocabulary: ids of the tokenizer, by token.
        encode: turns a text into ids.
    """

    def __init__(
        self, reserved: set[str], vocabulary: dict[str, int], encode: Callable[[str], list[int]]
    ) -> None:
        tokens = sorted(reserved, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, tokens)))
        self._of_id = {vocabulary[text]: text for text in tokens if text in vocabulary}
        self._encode = encode

    def refuse(self, text: str, where: str, allowed: frozenset[str] = frozenset()) -> str:
        """Return ``text``; raise if it spells a reserved token that is not ``allowed``."""
        try:
            text.encode()  # Raises if UTF-8 cannot encode the text; no tokenizer takes it then.
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: character {error.start} is half a surrogate pair: {text[error.start]!r}"
            ) from error
        for match in self._pattern.finditer(text):
            if match[0] not in allowed:
                excerpt = text[max(0, match.start() - 20) : match.end() + 20]
                raise ValueError(
                    f"{where}: the text spells the reserved {match[0]!r} at character "
                    f"{match.start()} (…{excerpt!r}…); remove or rewrite it"
                )
        return text

    def refuse_joined(self, texts: Sequence[str], where: str) -> None:
        """Raise ``ValueError`` if parts spell a reserved token only when they are joined."""
        apart = [token for text in texts for token in self._pattern.findall(text)]
        if len(texts) > 1 and (joined := self._pattern.findall("".join(texts))) != apart:
            raise ValueError(
                f"{where}: its parts together spell the reserved {joined}, one after the other "
                f"only {apart}; the chat template joins them: remove or rewrite it"
            )

    def refuse_made(
        self, messages: Sequence[Mapping[str, Any]], text: str, ids: Sequence[int]
    ) -> None:
        """Raise ``ValueError`` if ``ids`` hold a reserved token that ``text`` does not spell.

        A normaliser can make one, for example from full-width letters.
        """
        if not self._made(text, ids):
            return
        where = [
            f"conversations[{number}] ({message['role']}): {part!r}"
            for number, message in enumerate(messages)
            for part in strings(message)
            if self._made(part, self._encode(part))
        ]
        raise ValueError(
            f"{'; '.join(where) or 'conversations'}: the tokenizer makes a reserved token of text "
            "that does not spell it (its normaliser changes characters); remove or rewrite it"
        )

    def _made(self, text: str, ids: Sequence[int]) -> bool:
        made = [self._of_id[token] for token in ids if token in self._of_id]
        known = self._of_id.values()
        return made != [token for token in self._pattern.findall(text) if token in known]
