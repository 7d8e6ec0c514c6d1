"""Turns a conversation with images into token ids and a loss mask, in the layout of Step-3.7.

A conversation is rendered and tokenised once. Its turns are then found in the token ids: each
begins with the turn delimiter (``<|im_start|>``). No text can produce this token, because texts
that spell a special token are refused. So the work is linear in the number of turns, and the turns
found are the same as if every prefix of the conversation were tokenised.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from step37_data.common.checks import checked_int
from step37_data.common.image_entry import (  # noqa: F401  all of the constants are offered here, too
    IMAGE_ITEM_TYPE,
    IMAGE_TOKEN_COUNT,
    PATCH_ITEM_TYPE,
    PATCH_TOKEN_COUNT,
    EncodedImage,
    Entry,
    ImageFile,
    checked_entries,
)
from step37_data.text.messages import ReservedTokens, checked_role, map_texts, strings
from step37_data.text.placeholders import SampleImages
from step37_data.text.tokens import (  # noqa: F401  all of the constants are offered here, too
    IMAGE_END_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    MULTICROP_IMAGE_PLACEHOLDER,
    MULTICROP_PATCH_PLACEHOLDER,
    PATCH_END_TOKEN,
    PATCH_NEWLINE_TOKEN,
    PATCH_START_TOKEN,
    ImageTokens,
    load_tokenizer,
)

logger = logging.getLogger(__name__)

THINK_TOKENS = ("<think>", "</think>")

_KIND_OF = {
    MULTICROP_IMAGE_PLACEHOLDER: IMAGE_ITEM_TYPE,
    MULTICROP_PATCH_PLACEHOLDER: PATCH_ITEM_TYPE,
}
_MULTICROP_PLACEHOLDERS = re.compile("|".join(map(re.escape, _KIND_OF)))
# Part of the length cache's keys: raise it when the same conversation gets other tokens.
_TEMPLATE_VERSION = 1
_MULTICROP_VERSION = 1


class MultimodalSFTSample(dict[str, Any]):
    """One tokenised conversation.

    Items: ``tokens`` int64 ``[n]``, ``loss_mask`` float32 ``[n]``, ``image_paths`` (list of
    ``(path, item type)``, with multicrop of ``(path, item type, window)``), and ``as_viewed`` if
    the template has it on. ``len()`` is its length in training, n − 1 and never below 0, because
    inputs are ``tokens[:-1]`` and labels ``tokens[1:]``.
    """

    def __len__(self) -> int:
        return max(0, int(self["tokens"].numel()) - 1)

    def copy(self) -> MultimodalSFTSample:
        """Return a shallow copy of this type; a plain ``dict`` would have another ``len()``."""
        return type(self)(self)


@dataclass(kw_only=True, eq=False, repr=False)
class Step37MultimodalTemplate(ImageTokens):
    """Tokenises conversations for supervised fine-tuning of Step-3.7.

    In user, system and tool turns ``<image>`` becomes ``<im_start>``, 169 ``<im_patch>`` and
    ``<im_end>``. A text with ``<@image@>`` or ``<#image#>`` (multicrop) spells out its own start
    and end tokens, and those two become 169 or 81 bare ``<im_patch>``. Texts that spell any other
    special token, and assistant texts that spell a placeholder or image token, are refused: they
    would shift later images or end a turn early.

    With ``multicrop`` one ``<image>`` becomes the crops of the picture and then the full image as
    above. The crops come row by row, each as ``<patch_start>``, 81 ``<im_patch>`` and
    ``<patch_end>``, with a ``<patch_newline>`` between rows. The number of crops follows from the
    size in the header of the image file (see :mod:`step37_data.images.crops`).

    The loss is on the assistant turns after the last user turn; a message with ``loss_mask: 0`` is
    left out. A turn's loss begins after the generation prompt (``<|im_start|>assistant`` and what
    the chat template puts there, such as ``<think>``) and includes ``<|im_end|>`` and the line end.
    If the last token of the generation prompt merges with the text after it (an empty reasoning
    block makes one token of two line ends), the merged token belongs to the prompt.

    Args:
        tokenizer_path: folder with ``tokenizer.json``, ``tokenizer_config.json`` and
            ``chat_template.jinja``. Remote code is never run.
        image_token_count: ``<im_patch>`` per full image.
        patch_token_count: ``<im_patch>`` per crop.
        image_token, image_start_token, image_end_token, patch_start_token, patch_end_token: the
            special tokens; each must be one token of the tokenizer.
        max_sequence_length: longer samples are logged, but not cut; packing may drop them.
        path_rewrite_fn: applied to every image path.
        multicrop: expand ``<image>`` into crops and full image.
        as_viewed: plan for pictures as image viewers show them, for example turned by their EXIF
            orientation (see ``ImageOptions.as_viewed``). Turning swaps width and height, and so
            changes the crops. Samples, and the packs that ``pack_samples`` makes of them, carry
            this value, so that the pictures are read in the same way.

    Raises:
        ValueError: no tokenizer or chat template under the path, a special token missing from the
            tokenizer, a chat template that is broken or in another layout, or a token count that
            is no integer of at least 1.

    Attributes:
        kinds: ``{item type: (name, id of the start token, rows of an image or crop)}``.
        rows_after: ``{id of the start token: rows of its image or crop}``.
    """

    tokenizer_path: str
    max_sequence_length: int = 2048
    path_rewrite_fn: Callable[[str], str] | None = None
    multicrop: bool = False
    as_viewed: bool = False

    def __post_init__(self) -> None:
        if not self.tokenizer_path:
            raise ValueError("tokenizer_path: expected the folder of a tokenizer, got none")
        self.tokenizer_path = str(self.tokenizer_path)
        self.tokenizer = load_tokenizer(self.tokenizer_path)
        checked_int("image_token_count", self.image_token_count)
        checked_int("patch_token_count", self.patch_token_count)
        starts = (self.image_start_token, self.patch_start_token)
        ends = (self.image_end_token, self.patch_end_token)
        # The newline token is needed only with multicrop.
        newline = [PATCH_NEWLINE_TOKEN] if self.multicrop else []
        ids = [self._special_id(token) for token in (self.image_token, *starts, *ends, *newline)]
        self._image_id, self.img_start_token_id, self.patch_start_token_id = ids[:3]
        self.kinds = {
            IMAGE_ITEM_TYPE: ("image", self.img_start_token_id, self.image_token_count),
            PATCH_ITEM_TYPE: ("crop", self.patch_start_token_id, self.patch_token_count),
        }
        self.rows_after = {start: rows for _, start, rows in self.kinds.values()}
        self._multicrop_markup = frozenset({*_KIND_OF, *starts, *ends, PATCH_NEWLINE_TOKEN})
        self._generation_prompts: dict[Any, tuple[list[int], list[int]]] = {}
        self._generation_prompt(None)  # so another layout raises here
        # The tokens that the chat template writes are reserved too, special or not.
        written = set(self._encode(self._render([{"role": "user", "content": "?"}], True)))
        control = {
            token.content
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special or number in written
        }
        reserved = control - set(THINK_TOKENS) | self._multicrop_markup
        reserved |= {self.image_token, IMAGE_PLACEHOLDER}
        self._reserved = ReservedTokens(reserved, self.tokenizer.get_vocab(), self._encode)
        self._warned_about_length = False

    def __call__(self, data: Mapping[str, Any]) -> MultimodalSFTSample:
        """Tokenise one conversation.

        Args:
            data: ``conversations``, a list of messages (``role``, ``content`` as a string or a list
                of text parts; optional ``loss_mask``, ``reasoning_content``, ``tool_calls``; the
                first may carry ``tool_schemas`` and ``reasoning_effort``), ending with an assistant
                message; ``images``, a list of paths or ``(path, item type)``.

        Raises:
            ValueError: there is no user turn, no assistant turn at the end, a text spells a special
                token or placeholder that is not allowed there, or images and placeholders differ in
                number; the error names the message, the text and the position. Also if a message
                has another form, or the chat template cannot render it.
        """
        if "conversations" not in data:
            raise ValueError(f"data: expected conversations, got only {sorted(data)}")
        given = self._image_items(data.get("images"))
        images = SampleImages(given, as_viewed=self.as_viewed)
        messages = self._expand_messages(data["conversations"], images)
        roles = [message["role"] for message in messages]
        if "user" not in roles or roles[-1] != "assistant":
            raise ValueError(
                f"conversations: expected a user message and an assistant's at the end, got {roles}"
            )
        entries = images.seen() if self.multicrop else images.given
        text = self._render(messages, False)
        short_ids = self._encode(text)
        self._reserved.refuse_made(messages, text, short_ids)
        repeats = self._repeats(short_ids, images.wanted, entries)
        tokens = torch.from_numpy(np.repeat(np.array(short_ids, dtype=np.int64), repeats))
        loss_mask = torch.from_numpy(np.repeat(self._loss_mask(short_ids, messages), repeats))
        limit = self.max_sequence_length + 1
        if len(tokens) > limit and not self._warned_about_length:
            self._warned_about_length = True
            logger.warning(
                f"a sample of {len(tokens)} tokens is longer than max_sequence_length + 1 = {limit}"
                "; the oversize policy of the packing decides about it (said once)"
            )
        sample = MultimodalSFTSample(tokens=tokens, loss_mask=loss_mask, image_paths=entries)
        if self.as_viewed:
            sample["as_viewed"] = True
        return sample

    def fingerprint(self) -> str:
        """Return a hex digest of everything besides the conversation that decides its tokens."""
        tokenizer = self.tokenizer
        parts = [
            _TEMPLATE_VERSION,
            tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab(),
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
            [getattr(self, field.name) for field in fields(ImageTokens)],
            _MULTICROP_VERSION if self.multicrop else None,
        ]
        if self.multicrop and self.as_viewed:
            # The turned size decides the crops. Other digests are the same as before this option
            # existed, so that lengths measured then are still found.
            parts.append("as_viewed")
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _error(self, what: str) -> ValueError:
        return ValueError(f"tokenizer_path {self.tokenizer_path!r}: {what}")

    def _special_id(self, token: str) -> int:
        ids = self._encode(token)
        if len(ids) != 1 or self.tokenizer.convert_ids_to_tokens(ids[0]) != token:
            raise self._error(f"no special token {token!r}, it gives {len(ids)} tokens for it")
        return ids[0]

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer.is_fast:
            return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        first = messages[0]
        effort = first.get("reasoning_effort")
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=first.get("tool_schemas") or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **({} if effort is None else {"reasoning_effort": effort}),
            )
        except Exception as error:  # errors of jinja2, or of an expression in the template
            turns = ", ".join(message["role"] for message in messages)
            told = f"cannot render the turns {turns} ({type(error).__name__}: {error})"
            raise ValueError(f"the chat template in {self.tokenizer_path!r} {told}") from error

    def _generation_prompt(self, reasoning_effort: str | None) -> tuple[list[int], list[int]]:
        """Return the token ids of the generation prompt, and those up to the role's name."""
        if reasoning_effort not in self._generation_prompts:
            question = [{"role": "user", "content": "?", "reasoning_effort": reasoning_effort}]
            asked = self._render(question, False)
            text = self._render(question, True)[len(asked) :]
            ids = self._encode(text)
            delimiter = self.tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
            if delimiter is None or not text.startswith(f"{delimiter.content}assistant"):
                raise self._error(
                    "its chat template is not in the Step-3.7 layout: expected a generation prompt "
                    f"that begins with a special token and 'assistant', got {text!r}"
                )
            header = self._encode(f"{delimiter.content}assistant")
            self._generation_prompts[reasoning_effort] = (ids, header)
        return self._generation_prompts[reasoning_effort]

    def _expand_messages(
        self, conversations: Sequence[Mapping[str, Any]], images: SampleImages
    ) -> list[dict[str, Any]]:
        """Write one ``<im_patch>`` for each image and crop, and assign files to them in ``images``.

        One token instead of 169 makes rendering and tokenising several times faster. Special tokens
        are tokenised separately from the text around them, so repeating the id afterwards gives the
        same ids.
        """
        messages = []
        expand_question = functools.partial(self._expand, images)
        for number, original in enumerate(conversations):
            role = checked_role(number, original)
            message = dict(original)
            where = f"conversations[{number}] ({role})"
            expand = self._reserved.refuse if role == "assistant" else expand_question
            for key, value in original.items():
                if key in ("content", "reasoning_content"):
                    message[key], texts = map_texts(value, expand, where)
                    self._reserved.refuse_joined(texts, where)
                else:
                    for text in strings(value):
                        self._reserved.refuse(text, f"{where} {key}")
            messages.append(message)
        return messages

    def _expand(self, images: SampleImages, text: str, where: str) -> str:
        spelled_out = _MULTICROP_PLACEHOLDERS.findall(text)
        allowed = self._multicrop_markup if spelled_out else frozenset({IMAGE_PLACEHOLDER})
        self._reserved.refuse(text, where, allowed)
        if spelled_out:
            for placeholder in spelled_out:
                images.see(_KIND_OF[placeholder])
            return _MULTICROP_PLACEHOLDERS.sub(self.image_token, text)
        expanded, *pieces = text.split(IMAGE_PLACEHOLDER)
        for piece in pieces:
            runs = self.token_runs(images.see(IMAGE_ITEM_TYPE, self.multicrop))
            expanded += "".join(token for token, _ in runs) + piece
        return expanded

    def _image_items(self, images: Any) -> list[tuple[ImageFile, int]]:
        rewrite = self.path_rewrite_fn or str
        given = () if images is None else images
        return [
            (path if isinstance(path, EncodedImage) else rewrite(path), kind)
            for path, kind, _ in checked_entries("images", given, bare_path_kind=IMAGE_ITEM_TYPE)
        ]

    def _repeats(self, ids: list[int], wanted: list[int], images: Sequence[Entry]) -> np.ndarray:
        """Return how often to repeat each id; checks that images and placeholders match."""
        before = [left for left, token in itertools.pairwise(ids) if token == self._image_id]
        starts = [self.kinds[kind][1] for kind in wanted]
        if before != starts:
            found, expected = map(self.tokenizer.decode, (before, starts))
            raise ValueError(
                f"conversations: the chat template renders {len(before)} placeholders, after "
                f"{found!r}; expected {len(starts)}, after {expected!r}"
            )
        for kind, (name, start, _) in self.kinds.items():
            paths = [str(entry[0]) for entry in images if entry[1] == kind]
            count, due = ids.count(start), wanted.count(kind)
            if not len(paths) == due == count:
                raise ValueError(
                    f"images: {len(paths)} files of type {name} for {due} placeholders and "
                    f"{count} start tokens in the conversation: {paths}"
                )
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[np.equal(ids, self._image_id)] = [self.kinds[kind][2] for kind in wanted]
        return repeats

    def _loss_mask(self, ids: list[int], messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
        prompt, header = self._generation_prompt(messages[0].get("reasoning_effort"))
        turns = [place for place, token in enumerate(ids) if token == prompt[0]]
        answers = [
            (start, end)
            for start, end in itertools.pairwise([*turns, len(ids)])
            if ids[start : start + len(header)] == header
        ]
        roles = [message["role"] for message in messages]
        numbers = [number for number, role in enumerate(roles) if role == "assistant"]
        if len(answers) != len(numbers):
            raise ValueError(
                f"conversations: {len(numbers)} assistant messages rendered as {len(answers)} turns"
            )
        last_user = max(number for number, role in enumerate(roles) if role == "user")
        mask = np.zeros(len(ids), dtype=np.float32)
        for number, (start, end) in zip(numbers, answers, strict=True):
            if number < last_user or messages[number].get("loss_mask", 1) != 1:
                continue
            if roles[number - 1] != "assistant":
                self._check_prompt(ids[start : start + len(prompt)], prompt, number)
                start += len(prompt)
            mask[start:end] = 1.0
        return mask

    def _check_prompt(self, found: list[int], prompt: list[int], number: int) -> None:
        """Check that a turn begins with the prompt; its last token may be merged with the next."""
        told, expected = map(self.tokenizer.convert_ids_to_tokens, (found, prompt))
        if found[:-1] != prompt[:-1] or not told[-1].startswith(expected[-1]):
            raise ValueError(
                f"conversations[{number}] (assistant): rendered as {told}, which does not begin "
                f"with its generation prompt {expected}"
            )
