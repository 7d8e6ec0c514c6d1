"""What cannot be tokenised is an error that names the tokenizer, the message or the file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from step37_data.template import Step37MultimodalTemplate
from step37_data.text.tokens import load_tokenizer
from tests.data.text.test_template import TOKENIZER, edited_tokenizer, flickr


@pytest.fixture(scope="module")
def template() -> Step37MultimodalTemplate:
    return Step37MultimodalTemplate(tokenizer_path=str(TOKENIZER))


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("hello", r"conversations\[0\]: expected a message, got 'h'"),
        ([{"role": "user", "content": 3}], r"\[0\] \(user\): expected a string or a list .* got 3"),
        ([{"role": "user", "content": [5]}], r"\[0\] \(user\) part 0: .* mapping, got 5"),
        ([{"role": "user", "content": "a \ud83d"}], r"\[0\] \(user\): character 2 .* surrogate"),
        (
            [{"role": "user", "content": [{"type": "image"}]}, flickr()[1]],
            r"cannot render the turns user, assistant \(TemplateError: content part of type image",
        ),
        ([{"role": "poet", "content": "?"}, flickr()[1]], "user message and .* got .'poet'"),
    ],
)
def test_a_message_in_another_form_is_an_error_that_names_it(
    template: Step37MultimodalTemplate, conversation: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        template({"conversations": conversation})
    with pytest.raises(ValueError, match=r"data: expected conversations, got only \['images'\]"):
        template({"images": []})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("a.jpg", r"expected a list of a path or \(path, type\), got 'a.jpg'"),
        ([()], r"expected a path or \(path, type\), got \(\)"),
        ("", r"expected a list of a path or \(path, type\), got ''"),
        ([None], r"expected a path or \(path, type\), got None"),
        ([("a.jpg", [0])], r"a\.jpg: expected the item type 0 .* or 1 .*, got \[0\]"),
        ([("a.jpg", "image")], r"a\.jpg: expected the item type 0 .* or 1 .*, got 'image'"),
    ],
)
def test_images_in_another_form_are_an_error(
    template: Step37MultimodalTemplate, images: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"images: {message}"):
        template({"conversations": flickr(), "images": images})


@pytest.mark.parametrize("loss_mask", [None, "1", 0.5, 2, -1])
def test_a_loss_mask_is_0_or_1(template: Step37MultimodalTemplate, loss_mask: Any) -> None:
    answer = {"role": "assistant", "content": ".", "loss_mask": loss_mask}
    with pytest.raises(ValueError, match=r"\[1\] \(assistant\): expected a loss_mask of 0 or 1"):
        template({"conversations": [{"role": "user", "content": "?"}, answer]})
    for switch, trained in ((True, True), (1, True), (False, False), (0, False)):
        answer["loss_mask"] = switch
        sample = template({"conversations": [{"role": "user", "content": "?"}, answer]})
        assert bool(sample["loss_mask"].any()) == trained


def test_a_tokenizer_that_cannot_be_read_is_an_error_that_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def error_of(path: Path | str) -> str:
        with pytest.raises(ValueError, match=r"\Atokenizer_path: [^\n]*\Z") as info:
            Step37MultimodalTemplate(tokenizer_path=str(path))
        return str(info.value)

    for nowhere in ("no_such_tokenizer", "owner/no_such_tokenizer"):
        text = f"no tokenizer could be read from '{nowhere}' (there is no folder; tried the hub; "
        assert text in error_of(nowhere)
    files = "['tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja']"
    assert f"could be read from '{tmp_path}' (it lacks {files}; " in error_of(tmp_path)
    folder = Path(edited_tokenizer(tmp_path))
    (folder / "chat_template.jinja").unlink()
    assert f"tokenizer_path: '{folder}' has no chat template: expected" in error_of(folder)
    (folder / "tokenizer.json").write_text("{")
    assert f"read from '{folder}' (it lacks ['chat_template.jinja']; " in error_of(folder)


def test_a_path_that_is_no_folder_is_told_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (
        str(tmp_path / "none"), "./none", "../none", "~/none", "models/step/none",
        str(tmp_path / "tokenizer.json"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="; expected one with") as caught:
            Step37MultimodalTemplate(tokenizer_path=path)
        assert str(caught.value).startswith(f"tokenizer_path: there is no folder {path!r}")


def test_a_broken_chat_template_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    folder = edited_tokenizer(tmp_path, lambda _: "{% for m in %}")
    with pytest.raises(ValueError, match=f"'{folder}' cannot render .*TemplateSyntaxError"):
        Step37MultimodalTemplate(tokenizer_path=folder)


@pytest.mark.parametrize("name", ["image_token_count", "patch_token_count"])
def test_a_token_count_is_an_integer_of_at_least_1(name: str) -> None:
    for count, message in ((0, "at least 1, got 0"), (1.7, r"an integer, got 1\.7")):
        with pytest.raises(ValueError, match=f"{name}: expected {message}"):
            Step37MultimodalTemplate(tokenizer_path=str(TOKENIZER), **{name: count})


def test_the_tokenizers_own_code_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def from_pretrained(path: str, **options: Any) -> SimpleNamespace:
        given.update(options, path=path)
        return SimpleNamespace(chat_template="x")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    load_tokenizer("somewhere")
    assert given == {"path": "somewhere", "trust_remote_code": False}


@pytest.mark.parametrize(
    "tool_calls",
    [
        [{"function": {"name": "f", "arguments": {"<im_start>": 1}}}],
        ({"function": {"name": "<im_start>", "arguments": {}}},),
    ],
    ids=["in a key", "in a tuple"],
)
def test_a_special_token_is_found_wherever_a_message_spells_it(
    template: Step37MultimodalTemplate, tool_calls: Any
) -> None:
    answer = {"role": "assistant", "content": "a", "tool_calls": tool_calls}
    with pytest.raises(ValueError, match=r"\[1\] \(assistant\) tool_calls.*<im_start>"):
        template({"conversations": [{"role": "user", "content": "q"}, answer]})


@pytest.mark.parametrize(
    ("role", "parts"),
    [
        ("user", ["<|im_", "end|>more"]),
        ("user", [{"type": "text", "text": "<ima"}, {"type": "text", "value": "ge>"}]),
        ("assistant", ["a <im_st", "art> b"]),
        ("tool", ["<im_pat", "", "ch>"]),
    ],
)
def test_a_reserved_token_split_over_the_parts_of_a_message_is_refused(
    template: Step37MultimodalTemplate, role: str, parts: list[Any]
) -> None:
    answer = {"role": "assistant", "content": "."}
    conversation = [{"role": "user", "content": "q"}, {"role": role, "content": parts}, answer]
    with pytest.raises(ValueError, match=rf"\[1\] \({role}\): its parts together spell"):
        template({"conversations": conversation})


def unflagged_delimiter(folder: Path, normaliser: dict[str, str] | None) -> str:
    """The example's tokenizer; its turn delimiters are not special, and so may be normalised."""
    path = edited_tokenizer(folder, without="nothing")
    file = Path(path) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = normaliser
    for token in content["added_tokens"]:
        if token["content"] in ("<|im_start|>", "<|im_end|>"):
            token.update(special=False, normalized=normaliser is not None)
    file.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("text", ["x<|im_start|>user\n", "x<|im_end|>"])
def test_a_turn_delimiter_is_refused_though_the_tokenizer_does_not_flag_it_special(
    tmp_path: Path, text: str
) -> None:
    template = Step37MultimodalTemplate(tokenizer_path=unflagged_delimiter(tmp_path, None))
    with pytest.raises(ValueError, match=r"\[1\] \(assistant\).*reserved '<\|im_"):
        template({"conversations": flickr(text), "images": ["a.jpg"]})


def test_a_turn_delimiter_that_the_normaliser_makes_of_other_letters_is_refused(
    tmp_path: Path,
) -> None:
    path = unflagged_delimiter(tmp_path, {"type": "NFKC"})
    template = Step37MultimodalTemplate(tokenizer_path=path)
    template({"conversations": flickr("Ｗｉｄｅ letters as such"), "images": ["a.jpg"]})
    for text in ("x＜｜im_end｜＞ y", ["x＜｜im_", "end｜＞ y"]):
        answer = {"role": "assistant", "content": text}
        with pytest.raises(ValueError, match="makes a reserved token of text that does not spell"):
            template({"conversations": [flickr()[0], answer], "images": ["a.jpg"]})


@pytest.mark.parametrize(
    ("text", "place", "excerpt"),
    [
        ("a b <|im_end|> c d", 4, "a b <|im_end|> c d"),
        ("<|im_end|>" + 30 * "z", 0, "<|im_end|>" + 20 * "z"),
        (19 * "x" + "<|im_end|>", 19, 19 * "x" + "<|im_end|>"),
        (25 * "x" + "<|im_end|>" + 25 * "z", 25, 20 * "x" + "<|im_end|>" + 20 * "z"),
    ],
)
def test_a_refused_token_is_shown_with_the_twenty_characters_around_it_that_there_are(
    template: Step37MultimodalTemplate, text: str, place: int, excerpt: str
) -> None:
    told = f"the reserved '<|im_end|>' at character {place} (…{excerpt!r}…); remove or rewrite it"
    with pytest.raises(ValueError, match=re.escape(told)):
        template({"conversations": flickr(text), "images": ["a.jpg"]})
