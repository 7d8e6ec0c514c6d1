"""What a WebDataset sample may hold, and what happens to one that is wrong."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from tests.energon.conftest import TOKENIZER

energon = pytest.importorskip("megatron.energon", reason="the extra energon is not installed")

from step37_data.common.image_entry import EncodedImage
from step37_data.images.decode import BrokenImageError
from step37_data.preprocess import preprocess_packed_batch
from step37_energon.provider import Step37EnergonSFTDataProvider
from step37_energon.task_encoder import Step37TaskEncoder, cook_sample, prepare_shards

Build = Callable[..., Any]
Parts = dict[str, bytes | str | dict[str, Any]]


def picture(shade: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, shade, 0)).save(file, kind)
    return file.getvalue()


def asking(count: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "<image>" * count + " What is it?"},
            {"role": "assistant", "content": "A square."},
        ]
    }


@pytest.fixture
def shard(tmp_path: Path) -> Callable[[list[Parts]], Path]:
    def write(samples: list[Parts]) -> Path:
        (tmp_path / "train").mkdir()
        with tarfile.open(tmp_path / "train" / "000000.tar", "w") as tar:
            for number, parts in enumerate(samples):
                for part, content in parts.items():
                    if isinstance(content, dict):
                        content = json.dumps(content)
                    data = content.encode() if isinstance(content, str) else content
                    member = tarfile.TarInfo(f"s{number}.{part}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        prepare_shards(tmp_path, {"train": ["train/000000.tar"]})
        return tmp_path

    return write


def cook(parts: dict[str, Any], **options: Any) -> dict[str, Any]:
    sample = {"__key__": "k", "__restore_key__": (), "__sources__": (), "__subflavors__": {}}
    return cook_sample({**sample, **parts}, **options)


def cooked(**parts: Any) -> list[Any]:
    return cook(parts)["images"]


def test_pictures_come_as_the_json_names_them_and_otherwise_in_the_order_of_their_names() -> None:
    parts = {name: name.encode() for name in ("10.jpg", "2.png", "1.webp", "2.b.JPEG", "note.md")}
    given = cooked(json=json.dumps(asking(4)).encode(), **parts)
    assert [str(image) for image in given] == ["k.1.webp", "k.2.b.JPEG", "k.2.png", "k.10.jpg"]
    body = {**asking(1), "images": [["10.jpg", 1], "1.webp"]}
    crop, image = cooked(json=json.dumps(body).encode(), **parts)
    assert crop == (EncodedImage("k.10.jpg", b"10.jpg"), 1)
    assert image == EncodedImage("k.1.webp", b"1.webp")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"json": b"[]"}, "k.json: expected an object with messages"),
        ({"json": b'{"messages": [], "images": ["a.jpg"]}'}, "images name 'a.jpg', its pictures"),
        ({"jpg": b"", "md": b""}, r"expected json or txt, got the parts \['jpg', 'md'\]"),
        ({"json": b"{"}, "k.json: expected JSON: Expecting property name"),
        ({"json": b"\xff"}, "k.json: expected text in UTF-8"),
        ({"txt": b"caf\xe9"}, "k.txt: expected text in UTF-8"),
        ({"json": b"[" * 100_000}, "k.json: its lists and objects are nested too deeply"),
        ({"json": b'{"messages": 5}'}, "k.json: expected a list of messages, got 5"),
        # Beside a caption, too: it is a conversation, and a wrong one.
        ({"json": b'{"messages": null}', "txt": b"A."}, "k.json: expected a list of messages"),
        ({"json": b"{", "txt": b"A."}, "k.json: expected JSON"),
        ({"json": b'{"caption": "A."}'}, r"or a caption_key .*; got the keys \['caption'\]"),
    ],
)
def test_a_sample_of_another_form_is_refused_with_its_key(
    parts: dict[str, bytes], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cooked(**parts)


@pytest.mark.parametrize(
    "images",
    [None, 5, "a.jpg", {"a.jpg": 0}, [5], [{}], [None], [["a.jpg"]], [["a.jpg", 1, 2]], [[[], 0]],
     [["a.jpg", None]], [["a.jpg", 2]], [["a.jpg", []]], [["a.jpg", "crop"]]],
)  # fmt: skip
def test_images_of_any_other_form_are_a_value_error_with_the_key(images: Any) -> None:
    body = {**asking(1), "images": images}
    with pytest.raises(ValueError, match=r"k\.json: (expected )?images"):
        cook({"a.jpg": b"", "json": json.dumps(body).encode()})


@pytest.mark.parametrize(
    "odd", [None, 5, True, "x", "\ud800", [], {}, [[]], [{}], [None], {"a": 1}]
)
def test_messages_of_any_form_are_told_with_the_key_or_encoded(odd: Any) -> None:
    encoder = Step37TaskEncoder(TOKENIZER)
    conversations = [[odd], [*asking(1)["messages"], odd]]
    for place, name in itertools.product(
        (0, 1),
        ("role", "content", "loss_mask", "reasoning_content", "tool_calls", "reasoning_effort"),
    ):
        messages = [dict(message) for message in asking(1)["messages"]]
        messages[place][name] = odd
        conversations.append(messages)
    refused = []
    for messages in conversations:
        body = json.dumps({"messages": messages}).encode()
        try:
            encoder.encode_sample(cook({"jpg": b"", "json": body}))
        except ValueError as error:
            refused.append(str(error))
    assert refused
    assert all(message.startswith("sample k: ") for message in refused)


METADATA = json.dumps({"caption": " Of json. ", "url": "https://a", "width": 3}).encode()


@pytest.mark.parametrize(
    ("parts", "caption_key", "caption"),
    [
        ({"txt": b"Of txt.\n", "json": METADATA}, None, "Of txt."),
        ({"txt": b"Of txt.", "json": b"[1, 2]"}, None, "Of txt."),
        ({"txt": b"Of txt.", "json": METADATA}, "caption", "Of json."),
        ({"json": METADATA}, "caption", "Of json."),
        ({"txt": b"Of txt."}, "caption", "Of txt."),
        ({"txt": b"\xef\xbb\xbfA mark of the byte order."}, None, "A mark of the byte order."),
        ({"json": b"\xef\xbb\xbf" + METADATA}, "caption", "Of json."),
    ],
)
def test_a_caption_is_in_txt_or_where_caption_key_says_and_other_json_is_metadata(
    parts: dict[str, bytes], caption_key: str | None, caption: str
) -> None:
    sample = cook({"jpg": b"", **parts}, caption_key=caption_key)
    assert sample["caption"] == caption
    assert sample["images"] == [EncodedImage("k.jpg", b"")]
    assert "conversations" not in sample


def test_messages_are_a_conversation_whatever_is_beside_them() -> None:
    body = {**asking(1), "caption": "No."}
    sample = cook({"jpg": b"", "json": json.dumps(body).encode(), "txt": b"No."}, caption_key="no")
    assert sample["conversations"] == asking(1)["messages"]
    assert "caption" not in sample


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"text": "A."}', r"expected the caption_key 'caption', got the keys \['text'\]"),
        (b'"A."', "expected the caption_key 'caption', got 'A.'"),
        (b'{"caption": ["A."]}', r"expected a text under 'caption', got \['A.'\]"),
    ],
)
def test_json_without_the_caption_that_it_ought_to_hold_is_refused(
    body: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cook({"jpg": b"", "txt": b"Of txt.", "json": body}, caption_key="caption")


@pytest.mark.parametrize(
    "parts", [{"txt": b""}, {"txt": b" \n\t"}, {"txt": b"\xef\xbb\xbf"}, {"json": b'{"c": null}'}]
)
def test_a_blank_caption_is_skipped(parts: dict[str, bytes]) -> None:
    with pytest.raises(energon.SkipSample):
        cook({"jpg": b"", **parts}, caption_key="c")


def test_shards_with_metadata_and_blank_captions_are_drawn_and_the_blank_ones_counted(
    shard: Callable[[list[Parts]], Path], in_order: Build
) -> None:
    # More of each than Energon bears with errors.
    samples: list[Parts] = [{"jpg": picture(1), "txt": " ", "json": {"url": "a"}}] * 150
    samples += [{"jpg": picture(2), "txt": "A caption.", "json": {"url": "a"}}] * 150
    path = shard(samples)
    dataset = in_order(path, Step37TaskEncoder(TOKENIZER), packing_buffer_size=30)
    packs = list(energon.get_loader(dataset))
    assert sum(len(pack["__key__"]) for pack in packs) == 150
    assert sum(pack["skipped_samples"] for pack in packs) == 150
    dataset = in_order(path, Step37TaskEncoder(TOKENIZER, caption_key="url"))
    drawn = [key for pack in energon.get_loader(dataset) for key in pack["__key__"]]
    assert len(drawn) == 300


def test_a_data_set_without_captions_ends_the_run_and_not_the_training_time(
    shard: Callable[[list[Parts]], Path], in_order: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("step37_energon.task_encoder._MOST_BLANK", 40)
    path = shard([{"jpg": picture(1), "txt": ""}] * 3)
    dataset = in_order(path, Step37TaskEncoder(TOKENIZER), repeat=True)
    with pytest.raises(ValueError, match="the last 40 samples have blank captions"):
        next(iter(energon.get_loader(dataset)))


def test_what_cannot_be_told_is_skipped_by_energons_error_handling_and_counted(
    shard: Callable[[list[Parts]], Path], in_order: Build
) -> None:
    path = shard(
        [
            {"jpg": picture(1), "txt": "A caption."},
            {"jpg": picture(2), "json": asking(2)},  # one picture for two placeholders
            {"0.jpg": picture(3), "1.png": picture(4, "PNG"), "json": asking(2)},
            {"txt": "No picture."},
            {"json": asking(0)},
            {"jpg": picture(5), "json": "{"},
            {"jpg": picture(6), "txt": "Reserved <im_patch> token."},
            {"jpg": picture(7), "txt": "long " * 900},
        ]
    )
    reported = []

    def handler(error: Exception, *_: Any) -> None:
        reported.append(str(error))

    encoder = Step37TaskEncoder(TOKENIZER, max_packing_seqlen=640)
    dataset = in_order(path, encoder, packing_buffer_size=5, global_error_handler=handler)
    packs = list(energon.get_loader(dataset))
    assert [key for pack in packs for key in pack["__key__"]] == ["s0", "s2", "s4"]
    assert sum(pack["skipped_samples"] for pack in packs) == 4
    assert sum(pack["dropped_samples"] for pack in packs) == 1
    assert [text.partition(":")[0] for text in reported] == [
        "sample s1",
        "sample s3",
        "s5.json",
        "sample s6",
    ]
    assert "1 files of type image for 2 placeholders" in reported[0]


@pytest.mark.parametrize("multicrop", [False, True])
def test_a_broken_picture_follows_on_broken(
    shard: Callable[[list[Parts]], Path], in_order: Build, multicrop: bool
) -> None:
    photograph = picture(200)
    samples: list[Parts] = [{"jpg": photograph, "txt": "Whole."}]
    samples += [{"jpg": photograph[:200], "txt": "Cut."}, {"jpg": b"no picture", "txt": "None."}]
    path = shard(samples)

    def prepared(on_broken: Any) -> dict[str, Any]:
        encoder = Step37TaskEncoder(TOKENIZER, multicrop=multicrop, on_broken=on_broken)
        (pack,) = energon.get_loader(in_order(path, encoder, packing_buffer_size=3))
        return preprocess_packed_batch(
            pack,
            img_start_token_id=encoder.template.img_start_token_id,
            patch_start_token_id=encoder.template.patch_start_token_id,
            image_size=28,
            patch_image_size=28,
            encoder_patch_size=14,
            device="cpu",
        )

    zero, skip = prepared("zero"), prepared("skip-loss")
    images = zero["images"][-1].images
    assert len(images) == 3
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images[1], images[2])
    first, second, third, end = zero["cu_seqlens"][:4].tolist()
    assert zero["loss_masks"][0, second:third].sum() > 0
    assert skip["loss_masks"][0, second:end].sum() == 0
    kept = slice(first, second)
    assert torch.equal(skip["loss_masks"][0, kept], zero["loss_masks"][0, kept])
    with pytest.raises(BrokenImageError, match=r"image s1\.jpg could not be read"):
        prepared("raise")


@pytest.mark.parametrize("multicrop", [False, True])
def test_packs_say_whether_pictures_are_read_as_viewers_show_them(
    shard: Callable[[list[Parts]], Path], multicrop: bool
) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.effect_noise((900, 500), 60).save(file, "JPEG", exif=exif)
    with Image.open(file) as image:
        upright = io.BytesIO()
        ImageOps.exif_transpose(image).save(upright, "PNG")

    path = shard(
        [
            {"jpg": file.getvalue(), "txt": "Noise."},
            {"png": upright.getvalue(), "txt": "Noise."},
        ]
    )

    def pack_and_input(as_viewed: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        provider = Step37EnergonSFTDataProvider(
            path=str(path),
            tokenizer_path=TOKENIZER,
            multicrop=multicrop,
            as_viewed=as_viewed,
            packing_buffer_size=2,
            shuffle_buffer_size=None,
            num_workers=0,
        )
        pack = next(provider.build_datasets(None)[0])
        return pack, preprocess_packed_batch(
            pack,
            img_start_token_id=provider.img_start_token_id,
            patch_start_token_id=provider.patch_start_token_id,
            image_size=28,
            patch_image_size=14,
            encoder_patch_size=14,
            device="cpu",
            on_broken="raise",
        )

    pack, batch = pack_and_input(True)
    assert pack["as_viewed"] is True
    first, second, end = pack["cu_seqlens"][:3].tolist()
    assert torch.equal(pack["tokens"][first:second], pack["tokens"][second:end])
    assert len(batch["images"]) == 1 + multicrop
    for group in batch["images"]:
        assert torch.equal(*group.images.chunk(2))
    pack, batch = pack_and_input(False)
    assert "as_viewed" not in pack
    assert not torch.equal(*batch["images"][-1].images)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"packing": "worst_fit"}, "packing: expected one of next_fit, best_fit, balanced"),
        ({"on_broken": "ignore"}, "on_broken: expected one of zero, raise, skip-loss"),
        ({"seqlen_divisible_by": 0}, "seqlen_divisible_by: expected at least 1, got 0"),
        ({"max_packing_seqlen": 0}, "max_packing_seqlen: expected at least 1, got 0"),
    ],
)
def test_a_value_that_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Step37TaskEncoder(TOKENIZER, **given)


def test_the_blend_of_the_page_mixes_captions_with_conversations_about_several_pictures(
    shard: Callable[[list[Parts]], Path], tmp_path: Path, shards: Path
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "energon.md").read_text(encoding="utf-8")
    blend = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blend) == 1
    turns = [
        {"role": "user", "content": "<image>And this: <image> Which is darker?"},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": "And the other?"},
        {"role": "assistant", "content": "It is light."},
    ]
    talk = {"messages": turns, "images": ["b.jpg", "a.jpg"]}
    dialogues = shard([{"a.jpg": picture(200), "b.jpg": picture(9), "json": talk}] * 3)
    (tmp_path / "blend").mkdir()
    (tmp_path / "blend" / "captions").symlink_to(shards)
    (tmp_path / "blend" / "dialogues").symlink_to(dialogues)
    (tmp_path / "blend" / "blend.yaml").write_text(blend[0])
    provider = Step37EnergonSFTDataProvider(
        path=str(tmp_path / "blend" / "blend.yaml"),
        tokenizer_path=TOKENIZER,
        packing_buffer_size=8,
        num_workers=0,
    )
    packs, _, _ = provider.build_datasets(None)
    drawn = [next(packs) for _ in range(60)]
    keys = [key for pack in drawn for key in pack["__key__"]]
    talks = sum(key.startswith("s") for key in keys)
    # Energon draws by chance: four standard deviations.
    assert abs(talks / len(keys) - 0.25) < 4 * (0.75 * 0.25 / len(keys)) ** 0.5
    pack = next(pack for pack in drawn if any(key.startswith("s") for key in pack["__key__"]))
    # The picture names stand in the order of the conversation.
    named = [str(entry[0]).rpartition(".")[0][-1] for entry in pack["image_paths"]]
    assert ("b", "a") in itertools.pairwise(named)
    encoder = Step37TaskEncoder(TOKENIZER)
    text = encoder.template.tokenizer.decode(pack["labels"][pack["loss_masks"] > 0].tolist())
    assert "It is light." in text
    assert "The first." not in text


def test_a_film_in_the_place_of_a_picture_is_an_error_with_the_key() -> None:
    with pytest.raises(ValueError, match=r"sample k: .*image"):
        Step37TaskEncoder(TOKENIZER).encode_sample(cook({"mp4": b"film", "txt": b"A film."}))
