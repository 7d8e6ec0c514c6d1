"""Every format and kind of picture, from the file to the pixels, as stock reads it and as viewed.

The oracles are Pillow's one-liner, and ``ImageOps.exif_transpose`` with the arithmetic of white
paper in NumPy. What they say is written as plain PNGs into a second folder, whose packs have to be
those of the first.
"""

from __future__ import annotations

import csv
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from step37_data.common.image_entry import ImageEntry
from step37_data.images import stacks
from step37_data.images.crops import picture_size, plan_file
from step37_data.images.decode import (
    _PICTURE_FORMATS,
    open_image,
    picture_formats,
    read_rgb,
    viewed_otherwise,
)
from step37_data.images.options import ImageOptions
from step37_data.preprocess import preprocess_packed_batch
from step37_data.provider import Step37Flickr8kSFTDataProvider
from step37_inspect.viewer_difference import find_viewer_differences

TOKENIZER = str(Path(__file__).parents[2] / "examples" / "tokenizer")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# More than 1.5 times as wide as high, so that it takes two crops, which turning puts one below the
# other; and an odd number of pixels.
WIDTH, HEIGHT = 61, 37
SIDE, CROP_SIDE = 28, 14
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2)]  # fmt: skip


class Kind(NamedTuple):
    """A file that is made, and what a viewer shows otherwise of it."""

    picture: Image.Image | bytes
    options: Mapping[str, Any]
    told: tuple[str, ...] = ()


def smooth(channels: int) -> np.ndarray:
    """uint8 ``[HEIGHT, WIDTH, channels]``: waves, so that lossy formats have something to keep."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [np.sin(x / (3 + c) + c) + np.cos(y / (5 - c) + c) for c in range(channels)]
    return np.stack([(wave + 2) * 63.75 for wave in waves], axis=-1).astype(np.uint8)


def png(pixels: np.ndarray, *, interlaced: bool = False) -> bytes:
    """A PNG of colours of 8 or 16 bits, ``[h, w, 3]``, as Pillow cannot write it."""
    height, width = pixels.shape[:2]
    depth = pixels.dtype.itemsize * 8
    rows = b""
    for left, top, across, down in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        for row in pixels[top::down, left::across].astype(pixels.dtype.newbyteorder(">")):
            rows += b"\0" + row.tobytes() if row.size else b""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header = size + bytes([depth, 2, 0, 0, interlaced])
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def turned(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def moving(first: Image.Image) -> dict[str, Any]:
    return {"save_all": True, "append_images": [ImageOps.invert(first)]}


def make_kinds() -> dict[str, Kind]:
    rgb = Image.fromarray(smooth(3))
    grey = rgb.convert("L")
    palette = rgb.quantize(32)
    ramp = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) * 29
    deep = Image.fromarray(ramp.astype(np.uint16))
    colours_16 = smooth(3).astype(np.uint16) * 257 - 77
    # A colour is hidden under every degree of transparency.
    clear = rgb.copy()
    clear.putalpha(Image.fromarray(smooth(4)[..., 3]))
    clear.putpixel((0, 0), (200, 10, 20, 0))
    clear_grey = Image.merge("LA", (grey, clear.getchannel("A")))
    exif, alpha, of_16, frames = "turned by EXIF", "transparent", "16 bits", "animated"
    kinds = {f"turned{n}.jpg": Kind(rgb, turned(n), (exif,) * (n != 1)) for n in range(1, 9)}
    kinds |= {
        "plain.jpg": Kind(rgb, {}),
        "progressive.jpg": Kind(rgb, {"progressive": True}),
        "colours-halved.jpg": Kind(rgb, {"subsampling": 2, "quality": 40}),
        "cmyk.jpg": Kind(rgb.convert("CMYK"), {}),
        "grey.jpg": Kind(grey, {}),
        "turned-cmyk.jpg": Kind(rgb.convert("CMYK"), turned(8), (exif,)),
        "turned-grey.jpg": Kind(grey, turned(7), (exif,)),
        "two.mpo": Kind(rgb, moving(rgb)),
        "turned.mpo": Kind(rgb, moving(rgb) | turned(6), (exif,)),
        "plain.png": Kind(rgb, {}),
        "interlaced.png": Kind(png(smooth(3), interlaced=True), {}),
        "colours16.png": Kind(png(colours_16), {}),
        "colours16-interlaced.png": Kind(png(colours_16, interlaced=True), {}),
        "grey.png": Kind(grey, {}),
        "grey16.png": Kind(deep, {}, (of_16,)),
        "bilevel.png": Kind(rgb.convert("1"), {}),
        "palette.png": Kind(palette, {}),
        "palette-clear.png": Kind(palette, {"transparency": palette.getpixel((9, 9))}, (alpha,)),
        "palette-degrees.png": Kind(palette, {"transparency": bytes(range(0, 256, 8))}, (alpha,)),
        "one-colour-clear.png": Kind(rgb, {"transparency": rgb.getpixel((9, 9))}, (alpha,)),
        "one-grey-clear.png": Kind(grey, {"transparency": grey.getpixel((9, 9))}, (alpha,)),
        "la.png": Kind(clear_grey, {}, (alpha,)),
        "rgba.png": Kind(clear, {}, (alpha,)),
        "opaque.png": Kind(rgb.convert("RGBA"), {}),
        "turned-rgba.png": Kind(clear, turned(6), (exif, alpha)),
        "turned-grey16.png": Kind(deep, turned(8), (exif, of_16)),
        "turned-palette-clear.png": Kind(
            palette, {"transparency": palette.getpixel((9, 9)), **turned(5)}, (exif, alpha)
        ),
        "animated.png": Kind(rgb, moving(rgb), (frames,)),
        "still.gif": Kind(palette, {}),
        "clear.gif": Kind(palette, {"transparency": palette.getpixel((9, 9))}, (alpha,)),
        "animated.gif": Kind(rgb, moving(rgb), (frames,)),
        "lossy.webp": Kind(rgb, {"quality": 60}),
        "lossless.webp": Kind(rgb, {"lossless": True}),
        "rgba.webp": Kind(clear, {"lossless": True, "exact": True}, (alpha,)),
        "rgba-lossy.webp": Kind(clear, {}, (alpha,)),
        "animated.webp": Kind(rgb, moving(rgb), (frames,)),
        "turned.webp": Kind(rgb, turned(5), (exif,)),
        "plain.bmp": Kind(rgb, {}),
        "palette.bmp": Kind(palette, {}),
        "bilevel.bmp": Kind(rgb.convert("1"), {}),
        "plain.dib": Kind(rgb, {}),
        "plain.tif": Kind(rgb, {}),
        "packed.tif": Kind(rgb, {"compression": "tiff_lzw"}),
        "cmyk.tif": Kind(rgb.convert("CMYK"), {}),
        "rgba.tif": Kind(clear, {}, (alpha,)),
        "grey16.tif": Kind(deep, {}, (of_16,)),
        "grey16-big-endian.tif": Kind(Image.fromarray(ramp.astype(">u2")), {}, (of_16,)),
        "fractions.tif": Kind(grey.convert("F"), {}, ("more than 16 bits",)),
        "pages.tif": Kind(rgb, moving(rgb), (frames,)),
        "turned.tif": Kind(rgb, turned(6)),  # Pillow turns it, whoever asks
        "plain.ppm": Kind(rgb, {}),
        "grey.pgm": Kind(grey, {}),
        "grey16.pgm": Kind(deep, {}, (of_16,)),
        "grey10.pgm": Kind(b"P5 61 37 1023 " + (ramp % 1024).astype(">u2").tobytes(), {}, (of_16,)),
        "colours16.ppm": Kind(b"P6 61 37 65535 " + colours_16.astype(">u2").tobytes(), {}),
        "bilevel.pbm": Kind(rgb.convert("1"), {}),
        "icon.ico": Kind(clear, {"sizes": [(WIDTH, HEIGHT)]}, (alpha,)),
        "plain.tga": Kind(rgb, {"compression": "tga_rle"}),
        "rgba.tga": Kind(clear, {}, (alpha,)),
        "plain.pcx": Kind(rgb, {}),
        "plain.sgi": Kind(rgb, {}),
        "rgba.sgi": Kind(clear, {}, (alpha,)),
        "plain.qoi": Kind(rgb, {}),
        "rgba.qoi": Kind(clear, {}, (alpha,)),
    }
    if features.check("jpg_2000"):
        kinds["plain.jp2"] = Kind(rgb, {})
        kinds["lossy.jp2"] = Kind(rgb, {"quality_layers": [20]})
        kinds["rgba.jp2"] = Kind(clear, {}, (alpha,))
        kinds["grey16.jp2"] = Kind(deep, {}, (of_16,))
    if features.check("avif"):
        kinds["plain.avif"] = Kind(rgb, {})
        kinds["rgba.avif"] = Kind(clear, {}, (alpha,))
        kinds["turned.avif"] = Kind(rgb, turned(6), (exif,))
    return kinds


KINDS = make_kinds()
# Pillow's advice about palettes of several degrees of transparency, which stock ignores, too.
pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")


def as_stock(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def as_viewed(path: Path, told: tuple[str, ...]) -> Image.Image:
    with Image.open(path) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if "16 bits" in told:
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
    if "transparent" not in told:
        return image.convert("RGB")
    *colours, opacity = np.moveaxis(np.asarray(image.convert("RGBA"), dtype=np.int64), -1, 0)
    on_white = np.stack(colours, axis=-1) * opacity[..., None] + 255 * (255 - opacity[..., None])
    return Image.fromarray(((on_white + 127) // 255).astype(np.uint8))


def oracle(path: Path, viewed: bool) -> Image.Image:
    return as_viewed(path, KINDS[path.name].told) if viewed else as_stock(path)


def write_table(folder: Path, names: list[str]) -> None:
    with (folder / "train" / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption_0"])
        rows.writerows([name, f"Waves {number}."] for number, name in enumerate(names))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture of every kind."""
    root = tmp_path_factory.mktemp("kinds")
    (root / "train").mkdir()
    for name, kind in KINDS.items():
        path = root / "train" / name
        if isinstance(kind.picture, bytes):
            path.write_bytes(kind.picture)
        else:
            kind.picture.copy().save(path, **kind.options)  # Pillow leaves notes in what it saves
    write_table(root, list(KINDS))
    return root


@pytest.fixture(scope="module")
def plain_folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The same pictures as the oracles see them, as PNGs in RGB; by ``as_viewed``."""
    folders = {}
    for viewed in (False, True):
        folders[viewed] = tmp_path_factory.mktemp("plain")
        (folders[viewed] / "train").mkdir()
        for name in KINDS:
            picture = Image.fromarray(np.asarray(oracle(folder / "train" / name, viewed)))
            picture.save(folders[viewed] / "train" / f"{name}.png")
        write_table(folders[viewed], [f"{name}.png" for name in KINDS])
    return folders


def test_there_is_a_picture_of_every_format_that_is_read(folder: Path) -> None:
    seen = set()
    for name in KINDS:
        with open_image(str(folder / "train" / name)) as image:
            seen.add(image.format)
    assert seen >= set(picture_formats()) - {"JPEG2000", "AVIF"}
    assert len(KINDS) >= 40


def test_the_page_on_data_lists_the_formats_that_are_read_and_no_others() -> None:
    page = Path(__file__).parents[2] / "docs" / "data.md"
    match = re.search(
        r"Pictures may be (.*?), AVIF and JPEG2000\nwhere", page.read_text(), re.DOTALL
    )
    assert match is not None
    listed = re.sub(r"\(.*?\)", "", match[1])
    assert set(re.findall(r"[A-Z0-9]+", listed)) == set(_PICTURE_FORMATS)


@pytest.mark.parametrize("name", KINDS)
def test_a_picture_is_read_as_stock_does_or_as_viewers_show_it(folder: Path, name: str) -> None:
    path = folder / "train" / name
    for viewed in (False, True):
        expected = oracle(path, viewed)
        assert np.array_equal(read_rgb(str(path), as_viewed=viewed), expected)
        assert picture_size(str(path), as_viewed=viewed) == expected.size
        assert plan_file(str(path), as_viewed=viewed).size == expected.size
    with open_image(str(path)) as image:
        assert viewed_otherwise(image) == list(KINDS[name].told)
    changed = not np.array_equal(as_stock(path), as_viewed(path, KINDS[name].told))
    named = set(KINDS[name].told) - {"animated", "more than 16 bits"}
    assert changed == bool(named)


def test_inspect_names_the_pictures_that_a_viewer_shows_otherwise(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from step37_inspect.cli import main

    expected = {
        str(folder / "train" / name): "; ".join(kind.told)
        for name, kind in KINDS.items()
        if kind.told
    }
    assert (
        find_viewer_differences([str(folder / "train" / name) for name in KINDS], True) == expected
    )
    pytest.importorskip("transformers")
    assert main(["inspect", str(folder), "--tokenizer", TOKENIZER, "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    total = f"{len(KINDS)} files"
    assert f"images    0 of {total} cannot be read" in lines
    at = lines.index(f"pixels    {len(expected)} of {total} are not used as a viewer shows them")
    assert lines[at + 1 :] == [f"          {path}: {told}" for path, told in expected.items()]
    kinds = [told for kind in KINDS.values() for told in kind.told]
    turned = f"turned by EXIF: {kinds.count('turned by EXIF')} files, used"
    instead = "not turned; with --as-viewed turned upright"
    assert f"viewer    {turned} {instead}" in lines
    told = "more than 16 bits: 1 file, used with values above 255 as white; also with --as-viewed"
    assert f"viewer    {told}" in lines

    arguments = ["inspect", str(folder), "--tokenizer", TOKENIZER, "--quiet", "--as-viewed"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    left = {
        path: told for path, told in expected.items() if told in ("animated", "more than 16 bits")
    }
    at = lines.index(f"pixels    {len(left)} of {total} are not used as a viewer shows them")
    assert lines[at + 1 :] == [f"          {path}: {told}" for path, told in left.items()]
    instead = "turned upright; without --as-viewed not turned"
    assert f"viewer    {turned} {instead}" in lines


@pytest.mark.parametrize("viewed", [False, True])
def test_inspect_measures_and_draws_pictures_as_they_are_used(
    folder: Path, viewed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib", reason="pictures need the extra plots")
    from step37_inspect.cli import main
    from step37_inspect.pack_picture import _thumbnail, describe_pack

    packs = provider_of(folder, multicrop=True, as_viewed=viewed).build_datasets(None)[0]
    arguments = ["inspect", str(folder), "--tokenizer", TOKENIZER, "--quiet", "--skip-images"]
    arguments += ["--multicrop", "--max-length", "65536"] + ["--as-viewed"] * viewed
    assert main(arguments) == 0
    assert f", {packs.piece_sizes.sum()} in all" in capsys.readouterr().out
    pack = describe_pack(packs, 0)
    assert pack.as_viewed is viewed
    spans = [span for segment in pack.segments for span in segment.images if span.kind == "image"]
    assert [span.name for span in spans] == list(KINDS)
    for span in spans:
        shown = _thumbnail(span.entry, as_viewed=pack.as_viewed)
        assert np.array_equal(shown, oracle(folder / "train" / span.name, viewed))


def provider_of(folder: Path, **fields: Any) -> Step37Flickr8kSFTDataProvider:
    return Step37Flickr8kSFTDataProvider(
        tokenizer_path=TOKENIZER,
        cache_dir=str(folder),
        sample_count=None,
        dataset_sampling="sequential",
        max_packing_seqlen=65536,
        cache_lengths=False,
        image_size=SIDE,
        patch_image_size=CROP_SIDE,
        **fields,
    )


def input_of(pack: dict[str, Any], provider: Step37Flickr8kSFTDataProvider) -> dict[str, Any]:
    return preprocess_packed_batch(
        pack,
        img_start_token_id=provider.img_start_token_id,
        patch_start_token_id=provider.patch_start_token_id,
        image_size=SIDE,
        patch_image_size=CROP_SIDE,
        encoder_patch_size=14,
        device="cpu",
        on_broken="raise",
    )


def stacks_of(batch: dict[str, Any]) -> Iterator[torch.Tensor]:
    return (group.images for group in batch["images"])


@pytest.mark.parametrize("multicrop", [False, True])
@pytest.mark.parametrize("viewed", [False, True])
def test_packs_and_pixels_of_all_ways_are_those_of_the_plain_pictures(
    folder: Path, plain_folders: dict[bool, Path], viewed: bool, multicrop: bool
) -> None:
    pytest.importorskip("transformers")
    plain = provider_of(plain_folders[viewed], multicrop=multicrop)
    (pack,) = plain.build_datasets(None)[0]
    expected = input_of(pack, plain)
    provider = provider_of(folder, multicrop=multicrop, as_viewed=viewed)
    (pack,) = provider.build_datasets(None)[0]
    got = input_of(pack, provider)
    assert len(expected["images"]) == 1 + multicrop
    assert len(expected["images"][-1].images) == len(KINDS)
    assert torch.equal(got["input_ids"], expected["input_ids"])
    for ours, theirs in zip(stacks_of(got), stacks_of(expected), strict=True):
        assert torch.equal(ours, theirs)

    options = ImageOptions(
        image_size=SIDE, patch_image_size=CROP_SIDE, as_viewed=viewed, on_broken="raise"
    )
    entries = [ImageEntry(*entry) for entry in pack["image_paths"]]
    by_device = list(stacks._on_device(entries, options, DEVICE)[0].values())
    for ours, theirs in zip(filter(len, by_device), stacks_of(expected), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("multicrop", [False, True])
@pytest.mark.parametrize("viewed", [False, True])
def test_energons_packs_are_those_of_the_folder(
    folder: Path, viewed: bool, multicrop: bool, tmp_path: Path
) -> None:
    pytest.importorskip("megatron.energon", reason="the extra energon is not installed")
    from step37_energon.shards import write_shards
    from step37_energon.task_encoder import Step37TaskEncoder, cook_sample

    provider = provider_of(folder, multicrop=multicrop, as_viewed=viewed)
    (expected,) = provider.build_datasets(None)[0]
    encoder = Step37TaskEncoder(TOKENIZER, multicrop=multicrop, as_viewed=viewed)
    write_shards(folder, tmp_path / "shards", samples_per_shard=50, progress=False)
    parts: dict[str, dict[str, Any]] = {}
    for shard in sorted((tmp_path / "shards" / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, part = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                parts.setdefault(key, {})[part] = content.read()
    assert len(parts) == len(KINDS)
    keys = {"__restore_key__": (), "__subflavors__": {}}
    cooked = [cook_sample({"__key__": key, **keys, **part}) for key, part in parts.items()]
    samples = [encoder.encode_sample(sample) for sample in cooked]
    pack = encoder.pack_selected_samples(samples)
    assert pack.get("as_viewed", False) is viewed
    ours, theirs = input_of(pack, provider), input_of(expected, provider)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    for one, other in zip(stacks_of(ours), stacks_of(theirs), strict=True):
        assert torch.equal(one, other)
