"""Tokens and loss spans are those of tokenising every prefix; what would shift an image is refused.

The oracle renders and tokenises every prefix of the conversation, with all placeholders written
out, as the contract describes the template: quadratic, and independent of how turns are found.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import make_tokenizer
from step37_data.pack_transform import pack_samples
from step37_data.provider import Step37Flickr8kSFTDataProvider
from step37_data.template import (
    IMAGE_TOKEN_COUNT,
    PATCH_TOKEN_COUNT,
    MultimodalSFTSample,
    Step37MultimodalTemplate,
)

TOKENIZER = Path(__file__).parents[3] / "examples" / "tokenizer"
CROPS = "<im_start><@image@><im_end><patch_start><#image#><patch_end><patch_newline>"


@pytest.fixture(scope="module")
def template() -> Step37MultimodalTemplate:
    return Step37MultimodalTemplate(tokenizer_path=str(TOKENIZER), max_sequence_length=8192)


def written_out(content: Any) -> Any:
    if isinstance(content, list):
        return [
            written_out(part) if isinstance(part, str)
            else {k: written_out(v) if k in ("text", "value") else v for k, v in part.items()}
            for part in content
        ]  # fmt: skip
    if not isinstance(content, str):
        return content
    if "<@image@>" in content or "<#image#>" in content:
        return content.replace("<@image@>", "<im_patch>" * IMAGE_TOKEN_COUNT).replace(
            "<#image#>", "<im_patch>" * PATCH_TOKEN_COUNT
        )
    return content.replace("<image>", "<im_start>" + "<im_patch>" * IMAGE_TOKEN_COUNT + "<im_end>")


def slow_template(tokenizer: Any, conversations: list[dict[str, Any]]) -> tuple[Any, Any]:
    messages = [
        {k: written_out(v) if k == "content" else v for k, v in message.items()}
        for message in conversations
    ]
    tools = messages[0].get("tool_schemas")
    effort = messages[0].get("reasoning_effort")

    def tokens_of(count: int) -> list[int]:
        prefix = messages[:count]
        tokens: list[int] = tokenizer.apply_chat_template(
            prefix,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=prefix[-1]["role"] != "assistant",
            **({"tools": tools} if tools else {}),
            **({"reasoning_effort": effort} if effort else {}),
        )
        return tokens

    tokens = tokens_of(len(messages))
    mask = [0.0] * len(tokens)
    last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
    end = len(tokens_of(last_user + 1))
    for number in range(last_user + 1, len(messages)):
        start, end = end, len(tokens_of(number + 1))
        if messages[number]["role"] == "assistant" and messages[number].get("loss_mask", 1) == 1:
            mask[start:end] = [1.0] * (end - start)
    return tokens, mask


def assert_as_the_oracle(template: Any, conversations: list[Any], images: list[Any]) -> None:
    sample = template({"conversations": conversations, "images": images})
    tokens, mask = slow_template(template.tokenizer, conversations)
    assert sample["tokens"].tolist() == tokens
    assert sample["loss_mask"].tolist() == mask
    assert sample["tokens"].dtype == torch.int64
    assert sample["loss_mask"].dtype == torch.float32


TEXT = st.text(st.sampled_from("ab \n.,?é猫🐈<>|_/im"), max_size=12) | st.sampled_from(
    ["A cat .", "\n\nyes", " x", "<im_star", "image>", "im_end", ""]
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[Any]]:
    messages: list[dict[str, Any]] = []
    images: list[Any] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})

    def user() -> None:
        kind = draw(st.sampled_from(["text", "image", "two", "crops", "parts"]))
        text = draw(TEXT)
        if kind == "text":
            content: Any = text
        elif kind == "image":
            content = f"<image>\n{text}"
            images.append(f"{len(images)}.jpg")
        elif kind == "two":
            content = f"<image>{text}<image>"
            images.extend([f"{len(images)}.jpg", (f"{len(images)}b.jpg", 0)])
        elif kind == "crops":
            content = f"{CROPS}{text}"
            images.extend([(f"{len(images)}.jpg", 0), (f"{len(images)}c.jpg", 1)])
        else:
            content = [{"type": "text", "text": "<image>"}, {"type": "text", "value": text}, text]
            images.append(f"{len(images)}.jpg")
        messages.append({"role": "user", "content": content})

    def assistant() -> None:
        message: dict[str, Any] = {"role": "assistant", "content": draw(TEXT)}
        if draw(st.booleans()):
            message["reasoning_content"] = draw(TEXT)
        if draw(st.booleans()):
            message["loss_mask"] = draw(st.sampled_from([0, 1]))
        if draw(st.booleans()):
            call = {"name": "look", "arguments": {"at": draw(TEXT)}}
            message["tool_calls"] = [{"type": "function", "function": call}]
        messages.append(message)

    for _ in range(draw(st.integers(0, 2))):
        user()
        assistant()
    user()
    for _ in range(draw(st.integers(0, 2))):
        assistant()
        for _ in range(draw(st.integers(0, 2))):
            messages.append({"role": "tool", "content": draw(TEXT)})
    assistant()
    if draw(st.booleans()):
        schema = {"type": "function", "function": {"name": "look", "description": draw(TEXT)}}
        messages[0]["tool_schemas"] = [schema]
    return messages, images


@given(drawn=conversations())
def test_tokens_and_loss_spans_equal_those_of_tokenising_every_prefix(
    template: Step37MultimodalTemplate, drawn: tuple[list[Any], list[Any]]
) -> None:
    assert_as_the_oracle(template, *drawn)


@pytest.fixture(scope="module")
def other_layouts(tmp_path_factory: pytest.TempPathFactory) -> list[Step37MultimodalTemplate]:
    """Chat templates that differ from ours where models of this family differ."""

    def without_reasoning(chat: str) -> str:
        chat = chat.replace('{{- "<|im_start|>assistant\\n<think>\\n" -}}',
                            '{{- "<|im_start|>assistant\\n" -}}')  # fmt: skip
        return chat.replace('{{- "<think>\\n" ~ reasoning ~ "\\n</think>\\n" -}}', "")

    def tool_results_as_user_turns(chat: str) -> str:
        return chat.replace("<|im_start|>tool_response", "<|im_start|>user")

    def a_default_system_turn(chat: str) -> str:
        turn = '"<|im_start|>system\\nBe kind.<|im_end|>\\n"'
        return chat.replace("{{- bos_token -}}", f"{{{{- bos_token ~ {turn} -}}}}")

    changes = (without_reasoning, tool_results_as_user_turns, a_default_system_turn)
    return [
        Step37MultimodalTemplate(
            tokenizer_path=edited_tokenizer(tmp_path_factory.mktemp("chat"), change),
            max_sequence_length=8192,
        )
        for change in changes
    ]


@given(drawn=conversations())
def test_the_spans_do_not_depend_on_details_of_the_chat_template(
    other_layouts: list[Step37MultimodalTemplate], drawn: tuple[list[Any], list[Any]]
) -> None:
    for template in other_layouts:
        assert_as_the_oracle(template, *drawn)


@pytest.mark.parametrize("effort", [None, "none", "high"])
def test_the_loss_begins_after_the_generation_prompt_of_the_reasoning_effort(
    tmp_path: Path, effort: str | None
) -> None:
    """The first message's reasoning_effort reaches the template, for the prompt too."""

    def without_reasoning_where_no_effort_is_made(chat: str) -> str:
        only_then = '"" if reasoning_effort == "none" else'
        block = r'"<think>\n" ~ reasoning ~ "\n</think>\n"'
        chat = chat.replace(block, f"({only_then} {block})")
        return chat.replace(
            r'"<|im_start|>assistant\n<think>\n"',
            rf'"<|im_start|>assistant\n" ~ ({only_then} "<think>\n")',
        )

    template = Step37MultimodalTemplate(
        tokenizer_path=edited_tokenizer(tmp_path, without_reasoning_where_no_effort_is_made),
        max_sequence_length=8192,
    )
    question: dict[str, Any] = {"role": "user", "content": "What is it?"}
    if effort is not None:
        question["reasoning_effort"] = effort
    asked = [question, {"role": "assistant", "content": "A cat ."}]
    assert_as_the_oracle(template, asked, [])
    text = template.tokenizer.decode(template({"conversations": asked, "images": []})["tokens"])
    assert ("<think>" in text) == (effort != "none")


@given(drawn=st.lists(conversations(), min_size=1, max_size=4))
def test_image_k_of_a_pack_lands_in_the_sample_that_owns_it(
    template: Step37MultimodalTemplate, drawn: list[tuple[list[Any], list[Any]]]
) -> None:
    samples, owner = [], {}
    for number, (messages, images) in enumerate(drawn):
        named = []
        for k, image in enumerate(images):
            kind = image[1] if isinstance(image, tuple) else 0
            named.append((f"{number}/{k}.jpg", kind))
            owner[named[-1][0]] = number
        samples.append(template({"conversations": messages, "images": named}))
    packed = pack_samples(samples)
    bounds = packed["cu_seqlens"][1:].contiguous()
    for kind, token, rows in ((0, "<im_start>", 169), (1, "<patch_start>", 81)):
        start_id = template.tokenizer.convert_tokens_to_ids(token)
        starts = torch.nonzero(packed["tokens"] == start_id).flatten()
        paths = [path for path, its_kind in packed["image_paths"] if its_kind == kind]
        assert len(starts) == len(paths)
        for start, path in zip(starts.tolist(), paths, strict=True):
            place = int(torch.searchsorted(bounds, start, right=True))
            assert place == owner[path]
            patches = packed["tokens"][start + 1 : start + 1 + rows]
            assert (patches == template.tokenizer.convert_tokens_to_ids("<im_patch>")).all()
            assert start + rows < int(bounds[place])


def flickr(caption: str = "A cat .", prompt: str = "Describe this image.") -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"<image>\n{prompt}"},
        {"role": "assistant", "content": caption},
    ]


def test_an_image_is_169_patches_between_its_start_and_end_token(
    template: Step37MultimodalTemplate,
) -> None:
    sample = template({"conversations": flickr(), "images": ["a.jpg"]})
    tokens = template.tokenizer.convert_ids_to_tokens(sample["tokens"].tolist())
    start = tokens.index("<im_start>")
    assert tokens[start + 1 : start + 170] == ["<im_patch>"] * 169
    assert tokens[start + 170] == "<im_end>"
    assert tokens.count("<im_patch>") == 169
    assert sample["image_paths"] == [("a.jpg", 0)]
    assert len(sample) == len(tokens) - 1


def test_multicrop_placeholders_become_169_and_81_bare_patches(
    template: Step37MultimodalTemplate,
) -> None:
    conversation = [{"role": "user", "content": CROPS}, {"role": "assistant", "content": "x"}]
    sample = template({"conversations": conversation, "images": [("a.jpg", 0), ("b.jpg", 1)]})
    tokens = template.tokenizer.convert_ids_to_tokens(sample["tokens"].tolist())
    start = tokens.index("<im_start>")
    assert tokens[start : start + 255] == (
        ["<im_start>"] + ["<im_patch>"] * 169 + ["<im_end>"]
        + ["<patch_start>"] + ["<im_patch>"] * 81 + ["<patch_end>", "<patch_newline>"]
    )  # fmt: skip
    assert sample["image_paths"] == [("a.jpg", 0), ("b.jpg", 1)]


def test_images_stay_in_the_order_in_which_they_are_given(
    template: Step37MultimodalTemplate,
) -> None:
    conversation = [{"role": "user", "content": CROPS}, {"role": "assistant", "content": "x"}]
    images = [("b.jpg", 1), ("a.jpg", 0)]
    assert template({"conversations": conversation, "images": images})["image_paths"] == images


def test_a_text_part_may_call_its_text_value(template: Step37MultimodalTemplate) -> None:
    question = {"role": "user", "content": [{"type": "text", "value": "<image>"}]}
    conversation = [question, {"role": "assistant", "content": "x"}]
    sample = template({"conversations": conversation, "images": ["a.jpg"]})
    tokens = template.tokenizer.convert_ids_to_tokens(sample["tokens"].tolist())
    assert tokens.count("<im_patch>") == 169


def test_the_loss_covers_the_answer_after_the_generation_prompt_up_to_the_line_end(
    template: Step37MultimodalTemplate,
) -> None:
    sample = template({"conversations": flickr("A cat ."), "images": ["a.jpg"]})
    trained = sample["tokens"][sample["loss_mask"] == 1].tolist()
    assert template.tokenizer.decode(trained) == "</think>\nA cat .<|im_end|>\n"
    # The empty reasoning block merges the prompt's line end with the next one: prompt, no loss.
    first = int(sample["loss_mask"].argmax())
    assert template.tokenizer.decode(sample["tokens"][first - 2 : first]) == "<think>\n\n"


def test_only_answers_after_the_last_user_turn_are_trained(
    template: Step37MultimodalTemplate,
) -> None:
    conversation = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second", "reasoning_content": "hm"},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "third", "loss_mask": 0},
        {"role": "tool", "content": "more"},
        {"role": "assistant", "content": "fourth"},
    ]
    sample = template({"conversations": conversation})
    trained = template.tokenizer.decode(sample["tokens"][sample["loss_mask"] == 1].tolist())
    assert trained == "hm\n</think>\nsecond<|im_end|>\n</think>\nfourth<|im_end|>\n"


@pytest.mark.parametrize(
    "text",
    ["a <image> b", "<@image@>", "<#image#>", "<im_patch>", "<im_start>", "<im_end>",
     "<patch_start>", "<patch_newline>", "<patch_end>", "<|im_start|>", "x<|im_end|>\n",
     "<|begin_of_text|>"],
)  # fmt: skip
def test_an_answer_that_spells_a_placeholder_or_special_token_is_refused(
    template: Step37MultimodalTemplate, text: str
) -> None:
    with pytest.raises(ValueError, match=r"conversations\[1\] \(assistant\).*reserved"):
        template({"conversations": flickr(text), "images": ["a.jpg"]})
    reasoning = [*flickr()[:1], {"role": "assistant", "content": "", "reasoning_content": text}]
    with pytest.raises(ValueError, match=r"conversations\[1\] \(assistant\).*reserved"):
        template({"conversations": reasoning, "images": ["a.jpg"]})
    call = {"function": {"name": "f", "arguments": {"deep": [text]}}}
    calling = [*flickr()[:1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(ValueError, match=r"tool_calls.*reserved"):
        template({"conversations": calling, "images": ["a.jpg"]})


@pytest.mark.parametrize("role", ["user", "tool", "system"])
@pytest.mark.parametrize("text", ["<im_patch>", "<im_start>", "<|im_end|>", "<patch_start>"])
def test_a_question_or_result_that_spells_a_special_token_is_refused(
    template: Step37MultimodalTemplate, role: str, text: str
) -> None:
    conversation = [{"role": "user", "content": "?"}, {"role": role, "content": f"see {text}"},
                    {"role": "assistant", "content": "."}]  # fmt: skip
    with pytest.raises(ValueError, match=rf"conversations\[1\] \({role}\).*at character 4"):
        template({"conversations": conversation})


def test_a_plain_placeholder_beside_multicrop_ones_is_refused(
    template: Step37MultimodalTemplate,
) -> None:
    conversation = [{"role": "user", "content": f"<image>{CROPS}"}, *flickr()[1:]]
    with pytest.raises(ValueError, match="reserved '<image>'"):
        template({"conversations": conversation, "images": ["a", "b", ("c", 1)]})


def test_think_tags_in_an_answer_are_its_reasoning(template: Step37MultimodalTemplate) -> None:
    tagged = template({"conversations": flickr("<think>\nhm\n</think>\nyes"), "images": ["a"]})
    split = [*flickr()[:1], {"role": "assistant", "content": "yes", "reasoning_content": "hm"}]
    apart = template({"conversations": split, "images": ["a"]})
    assert tagged["tokens"].tolist() == apart["tokens"].tolist()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "0 files of type image for 1 placeholders"),
        (["a.jpg", "b.jpg"], "2 files of type image for 1 placeholders"),
        ([("a.jpg", 1)], "0 files of type image for 1 placeholders"),
        (["a.jpg", ("b.jpg", 1)], "1 files of type crop for 0 placeholders"),
        ([("a.jpg", 2)], r"images: a\.jpg: expected the item type 0 .*, got 2"),
    ],
)
def test_images_and_placeholders_that_differ_in_number_are_an_error(
    template: Step37MultimodalTemplate, images: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        template({"conversations": flickr(), "images": images})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<@image@>", r"1 placeholders, after '\\n'; expected 1, after '<im_start>'"),
        ("<im_start><#image#><im_end>", "after '<im_start>'; expected 1, after '<patch_start>'"),
        ("<patch_start><@image@><patch_end>", "after '<patch_start>'; .* after '<im_start>'"),
        (
            "<im_start><@image@><@image@><im_end>",
            "after '<im_start><im_patch>'; expected 2, after '<im_start><im_start>'",
        ),
        ("<im_start><im_start><@image@><im_end>", "of type image for 1 placeholders and 2 start"),
    ],
)
def test_a_placeholder_without_its_own_start_token_is_an_error(
    template: Step37MultimodalTemplate, content: str, message: str
) -> None:
    conversation = [{"role": "user", "content": content}, {"role": "assistant", "content": "."}]
    with pytest.raises(ValueError, match=message):
        template({"conversations": conversation, "images": ["a.jpg"]})


def test_a_conversation_needs_a_question_and_ends_with_an_answer(
    template: Step37MultimodalTemplate,
) -> None:
    for wrong in ([], flickr()[:1]):
        with pytest.raises(ValueError, match="and an assistant's at the end, got"):
            template({"conversations": wrong, "images": []})
    with pytest.raises(ValueError, match=r"expected a user message .* got \['assistant'\]"):
        template({"conversations": flickr()[1:]})


def test_a_message_needs_a_role(template: Step37MultimodalTemplate) -> None:
    with pytest.raises(ValueError, match=r"conversations\[1\]: expected a role, got None"):
        template({"conversations": [*flickr()[:1], {"from": "gpt", "value": "x"}]})


def test_tokenising_leaves_the_conversation_as_it_was(template: Step37MultimodalTemplate) -> None:
    data = {"conversations": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]},
                              *flickr()[1:]], "images": ["a.jpg"]}  # fmt: skip
    before = copy.deepcopy(data)
    template(data)
    assert data == before


def test_the_time_grows_linearly_with_the_number_of_turns(
    template: Step37MultimodalTemplate,
) -> None:
    def seconds(turns: int) -> float:
        conversation: list[dict[str, Any]] = [{"role": "user", "content": "start"}]
        for _ in range(turns):
            conversation += [{"role": "assistant", "content": "I look at the picture ." * 20},
                             {"role": "tool", "content": "a result"}]  # fmt: skip
        conversation.append({"role": "assistant", "content": "done"})
        best = float("inf")
        for _ in range(3):
            begin = time.perf_counter()
            template({"conversations": conversation})
            best = min(best, time.perf_counter() - begin)
        return best

    # Tokenising every prefix takes 8 × 8 times as long.
    assert seconds(400) < 20 * seconds(50)


def edited_tokenizer(folder: Path, change_chat: Any = None, without: str = "") -> str:
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    chat = folder / "tokenizer" / "chat_template.jinja"
    if change_chat:
        text = change_chat(chat.read_text())
        assert text != chat.read_text()
        chat.write_text(text)
    if without:
        path = folder / "tokenizer" / "tokenizer.json"
        content = json.loads(path.read_text())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != without]
        path.write_text(json.dumps(content))
    return str(folder / "tokenizer")


@pytest.mark.parametrize("token", ["<im_start>", "<im_patch>", "<im_end>", "<patch_start>"])
def test_a_tokenizer_without_an_image_token_is_an_error(tmp_path: Path, token: str) -> None:
    path = edited_tokenizer(tmp_path, without=token)
    with pytest.raises(ValueError, match=f"no special token '{token}'"):
        Step37MultimodalTemplate(tokenizer_path=path)


def test_an_answer_that_does_not_begin_with_the_generation_prompt_is_an_error(
    tmp_path: Path,
) -> None:
    # Stock would count the prompt's tokens all the same and put the loss on the wrong ones.
    path = edited_tokenizer(
        tmp_path, lambda text: text.replace('"<think>\\n" ~ reasoning', '"Reasoning:" ~ reasoning')
    )
    template = Step37MultimodalTemplate(tokenizer_path=path)
    with pytest.raises(ValueError, match="does not begin with its generation prompt"):
        template({"conversations": flickr(), "images": ["a.jpg"]})


def test_a_chat_template_in_another_layout_is_an_error(tmp_path: Path) -> None:
    path = edited_tokenizer(
        tmp_path,
        lambda text: text.replace('"<|im_start|>assistant\\n<think>\\n"', '"Assistant: "'),
    )
    with pytest.raises(ValueError, match=r"not in the Step-3\.7 layout"):
        Step37MultimodalTemplate(tokenizer_path=path)


def test_a_chat_template_that_drops_an_image_is_an_error(tmp_path: Path) -> None:
    path = edited_tokenizer(
        tmp_path, lambda text: text.replace('message.role ~ "\\n" ~ text_of(message.content)',
                                            'message.role ~ "\\n"')
    )  # fmt: skip
    template = Step37MultimodalTemplate(tokenizer_path=path)
    with pytest.raises(
        ValueError, match="renders 0 placeholders, after ''; expected 1, after '<im_start>'"
    ):
        template({"conversations": flickr(), "images": ["a.jpg"]})


def test_no_tokenizer_path_is_an_error() -> None:
    with pytest.raises(ValueError, match="tokenizer_path"):
        Step37MultimodalTemplate(tokenizer_path="")


def test_a_tokenizer_that_needs_remote_code_does_not_run_it(tmp_path: Path) -> None:
    folder = Path(edited_tokenizer(tmp_path))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["remote.Evil", "remote.Evil"]}
    config["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (folder / "remote.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    # transformers may refuse the folder, or load its tokenizer.json without the code.
    with contextlib.suppress(ValueError):
        Step37MultimodalTemplate(tokenizer_path=str(folder))
    assert not marker.exists()


def test_the_fingerprint_changes_with_everything_that_decides_tokens(
    template: Step37MultimodalTemplate, tmp_path: Path
) -> None:
    same = Step37MultimodalTemplate(tokenizer_path=str(TOKENIZER), max_sequence_length=64)
    fewer = Step37MultimodalTemplate(tokenizer_path=str(TOKENIZER), image_token_count=81)
    chat = Step37MultimodalTemplate(
        tokenizer_path=edited_tokenizer(tmp_path, lambda text: text.replace("Tools that", "What"))
    )
    assert same.fingerprint() == template.fingerprint()
    assert len({template.fingerprint(), fewer.fingerprint(), chat.fingerprint()}) == 3


def test_image_paths_are_rewritten_by_the_users_function() -> None:
    template = Step37MultimodalTemplate(
        tokenizer_path=str(TOKENIZER), path_rewrite_fn=lambda path: f"/data/{path}"
    )
    sample = template({"conversations": flickr(), "images": ["a.jpg"]})
    assert sample["image_paths"] == [("/data/a.jpg", 0)]


def test_a_sample_longer_than_a_pack_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    template = Step37MultimodalTemplate(tokenizer_path=str(TOKENIZER), max_sequence_length=100)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            template({"conversations": flickr(), "images": ["a.jpg"]})
    assert len(caplog.records) == 1
    assert "longer than max_sequence_length + 1 = 101" in caplog.text


def test_the_length_that_is_logged_is_by_default_that_of_a_providers_packs() -> None:
    template = Step37MultimodalTemplate(tokenizer_path=str(TOKENIZER))
    packs = Step37Flickr8kSFTDataProvider(tokenizer_path=str(TOKENIZER)).max_packing_seqlen
    assert template.max_sequence_length == packs


def test_a_template_survives_pickling(template: Step37MultimodalTemplate) -> None:
    clone = pickle.loads(pickle.dumps(template))
    data = {"conversations": flickr(), "images": ["a.jpg"]}
    assert clone(data)["tokens"].tolist() == template(data)["tokens"].tolist()


def test_the_shipped_tokenizer_is_what_its_script_makes(
    template: Step37MultimodalTemplate, tmp_path: Path
) -> None:
    make_tokenizer.save(
        make_tokenizer.train(
            make_tokenizer.corpus(TOKENIZER.parent / "flickr8k_mini/train/metadata.csv")
        ),
        tmp_path,
    )
    made, shipped = (json.loads((folder / "tokenizer.json").read_text())
                     for folder in (tmp_path, TOKENIZER))  # fmt: skip
    assert made["model"] == shipped["model"]
    assert made["added_tokens"] == shipped["added_tokens"]
    config = "tokenizer_config.json"
    assert (tmp_path / config).read_text() == (TOKENIZER / config).read_text()
    assert template.tokenizer.bos_token_id == 0


def test_the_length_of_a_sample_is_its_tokens_less_one() -> None:
    for count in range(4):
        sample = MultimodalSFTSample(tokens=torch.zeros(count, dtype=torch.long))
        assert len(sample) == len(sample.copy()) == max(0, count - 1)
        assert sample.copy().keys() == {"tokens"}
