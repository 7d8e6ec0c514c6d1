"""Tokens that no text may spell, because they delimit turns and pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from step37_data.text.messages import strings


class ReservedTokens:
    """Finds reserved tokens in texts and in their ids.

    Args:
        reserved: the tokens as text.
        vocabulary: ids of the tokenizer.
        encode: text → ids.
    """

    def __init__(
        self,
        reserved: Iterable[str],
        vocabulary: Mapping[str, int],
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        tokens = sorted(reserved, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, tokens)))
        self._of_id = {vocabulary[text]: text for text in tokens if text in vocabulary}
        self._encode = encode

    def refuse(self, text: str, where: str, allowed: frozenset[str] = frozenset()) -> str:
        """``text`` itself, if the only reserved tokens it spells are the ``allowed`` ones."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: character {error.start} of the text is {text[error.start]!r}, half of a "
                "surrogate pair, which no tokenizer takes; remove or replace it"
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
