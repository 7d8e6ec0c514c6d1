"""The messages of a conversation: what each may hold, and what no text in it may spell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from step37_data.text.tokens import IMAGE_PLACEHOLDER

CAPTION_PROMPT = "Describe this image in one sentence."
"""What the user asks about a picture that comes with a caption, unless somebody says otherwise."""


def caption_dialogue(caption: str, prompt: str) -> list[dict[str, str]]:
    """A caption as a conversation: the user shows a picture and asks, the assistant answers.

    Args:
        caption: the answer.
        prompt: the user's text, after the picture.
    """
    return [
        {"role": "user", "content": f"{IMAGE_PLACEHOLDER}\n{prompt}"},
        {"role": "assistant", "content": caption},
    ]


def checked_role(number: int, message: Any) -> str:
    """The role of message ``number``.

    Raises:
        ValueError: it is no mapping, has no role, a ``loss_mask`` other than 0 and 1, or a
            ``reasoning_effort`` that is no text.
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
        yield from strings(list(value.items()))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings(inner)


class ReservedTokens:
    """Finds reserved tokens in texts and in their ids: those that delimit turns and pictures.

    Args:
        reserved: the tokens as text.
        vocabulary: ids of the tokenizer.
        encode: text → ids.
    """

    def __init__(
        self, reserved: set[str], vocabulary: dict[str, int], encode: Callable[[str], list[int]]
    ) -> None:
        tokens = sorted(reserved, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, tokens)))
        self._of_id = {vocabulary[text]: text for text in tokens if text in vocabulary}
        self._encode = encode

    def refuse(self, text: str, where: str, allowed: frozenset[str] = frozenset()) -> str:
        """``text`` itself, if the only reserved tokens it spells are the ``allowed`` ones."""
        try:
            text.encode()  # No tokenizer takes what UTF-8 cannot hold.
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
        """Raise ``ValueError`` where parts that will be joined spell more together than apart."""
        apart = [token for text in texts for token in self._pattern.findall(text)]
        if len(texts) > 1 and (joined := self._pattern.findall("".join(texts))) != apart:
            raise ValueError(
                f"{where}: its parts together spell the reserved {joined}, one after the other "
                f"only {apart}; the chat template joins them: remove or rewrite it"
            )

    def refuse_made(
        self, messages: Sequence[Mapping[str, Any]], text: str, ids: Sequence[int]
    ) -> None:
        """Raise ``ValueError`` where ``ids`` hold a reserved token that their ``text`` does not
        spell, as a normaliser that knows of full-width letters makes it."""
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
