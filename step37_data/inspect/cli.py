"""Look at the packs of a cache folder: ``step37-data inspect``, or ``-m step37_data.inspect.cli``.

Without ``--pack`` it describes the data set (lengths, fill of both packings, dropped samples,
broken images); with ``--pack N`` one pack, as a table and, with ``--out``, as a picture. It reads
what is in the folder and downloads nothing. ``--picture FILE`` needs no folder: it shows how
multicrop sees one image file (canvas, windows, token layout).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from step37_data.flickr8k_loader import Step37Flickr8kDataset, read_flickr8k_metadata
from step37_data.images.crops import picture_size
from step37_data.images.decode import DECODE_ERRORS, default_threads, read_rgb
from step37_data.inspect.crop_picture import describe_picture, draw_crops
from step37_data.inspect.pack_picture import PackDescription, describe_pack, draw_pack
from step37_data.pack_transform import pack_samples
from step37_data.packed_dataloader import MixedPackedDataloader, Packing
from step37_data.packing import pack, pack_best_fit
from step37_data.template import (
    IMAGE_ITEM_TYPE,
    PATCH_ITEM_TYPE,
    Step37MultimodalTemplate,
)

_BARS = 16
_BAR_WIDTH = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``step37-data``; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        for line in _describe(options):
            print(line)
    except (OSError, ValueError) as error:
        print(f"step37-data: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="step37-data")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="show the packs of a cache folder",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = inspect.add_argument
    add("cache_dir", type=Path, nargs="?", help="folder in the layout of the data set")
    add("--tokenizer", help="folder of the tokenizer")
    add("--picture", type=Path, metavar="FILE", help="show how multicrop sees this image file")
    add("--pack", type=int, metavar="N", help="show this pack instead of the data set")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="with --pack or --picture: draw it into this file, such as p.png",
    )
    add("--multicrop", action="store_true", help="see images in crops")
    add("--split", default="train")
    add("--sample-count", type=int, metavar="N", help="look at the first N samples only")
    add("--caption-key", default="caption_0", metavar="COLUMN")
    add("--prompt", default="Describe this image in one sentence.")
    add("--max-length", type=int, default=2048, metavar="TOKENS", help="capacity of a pack")
    add("--divisible-by", type=int, default=64, metavar="TOKENS", help="multiple padded to")
    add("--oversize", choices=("drop", "extend"), default="drop")
    add("--sampling", choices=("random", "sequential"), default="random")
    add("--packing", choices=("next_fit", "best_fit"), default="next_fit")
    add("--lengths-cache", type=Path, metavar="FOLDER", help="keep lengths here between runs")
    add("--skip-images", action="store_true", help="do not read every image to find broken ones")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def _describe(options: argparse.Namespace) -> Iterator[str]:
    if options.out is not None and options.pack is None and options.picture is None:
        raise ValueError("--out: expected --pack or --picture with it, to say what to draw")
    if options.picture is not None:
        yield from _describe_picture(str(options.picture), options.out)
        return
    if options.cache_dir is None or options.tokenizer is None:
        raise ValueError("expected a cache folder and --tokenizer, or --picture FILE")
    dataset = _open(options)
    describe = _describe_dataset if options.pack is None else _describe_pack
    yield from describe(dataset, options)


def _describe_picture(path: str, out: Path | None) -> Iterator[str]:
    try:
        size = picture_size(path)
        drawing = None if out is None else draw_crops(path)
    except DECODE_ERRORS as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    yield from describe_picture(path, size)
    if drawing is not None:
        drawing.save(out)
        yield f"drawing   {out}"


def _open(options: argparse.Namespace) -> Step37Flickr8kDataset:
    metadata = options.cache_dir / options.split / "metadata.csv"
    samples = read_flickr8k_metadata(metadata, options.caption_key, options.sample_count)
    if not samples:
        raise ValueError(f"{metadata}: no row has a file_name and a {options.caption_key}")
    template = Step37MultimodalTemplate(
        tokenizer_path=options.tokenizer,
        max_sequence_length=options.max_length,
        multicrop=options.multicrop,
    )
    return Step37Flickr8kDataset(samples, template, options.prompt)


def _load(
    dataset: Step37Flickr8kDataset, options: argparse.Namespace, packing: Packing
) -> MixedPackedDataloader:
    return MixedPackedDataloader(
        [dataset],
        [1.0],
        options.max_length,
        options.oversize,
        functools.partial(pack_samples, seqlen_divisible_by=options.divisible_by),
        options.sampling,
        packing=packing,
        lengths_cache_dir=options.lengths_cache,
        progress=not options.quiet,
    )


def _describe_dataset(dataset: Step37Flickr8kDataset, options: argparse.Namespace) -> Iterator[str]:
    loader = _load(dataset, options, "next_fit")
    # Lengths in the order drawn. Dropped samples are among them.
    sizes = loader.piece_sizes.astype(np.int64)
    paths = dict.fromkeys(sample.image_path for sample in dataset.samples)
    yield (
        f"data set  {options.cache_dir}/{options.split}, {options.caption_key}: "
        f"{len(dataset)} samples, {len(paths)} image files"
    )
    low, middle, high = np.percentile(sizes, [5, 50, 95]).round().astype(int).tolist()
    yield (
        f"lengths   {sizes.min()} to {sizes.max()} tokens, median {middle}, "
        f"90 % from {low} to {high}, {int(sizes.sum())} in all"
    )
    yield from _histogram(sizes)
    yield f"packs     of {options.max_length} tokens, oversize samples: {options.oversize}"
    for name, result in (
        ("next_fit", pack(sizes, options.max_length, options.oversize)),
        ("best_fit", pack_best_fit(sizes, options.max_length, options.oversize)[1]),
    ):
        kept = sizes if options.oversize == "extend" else sizes[sizes <= options.max_length]
        capacity = result.num_packed_samples * options.max_length
        yield (
            f"          {name}: {result.num_packed_samples} packs, "
            f"{kept.sum() / capacity:.1%} filled, {result.num_droped} dropped"
        )
    if options.skip_images:
        yield "images    not read (--skip-images)"
        return
    broken = find_broken_images(list(paths), progress=not options.quiet)
    yield f"images    {len(broken)} of {len(paths)} files cannot be read"
    for path, reason in broken.items():
        yield f"          {path}: {reason}"


def _histogram(sizes: np.ndarray) -> Iterator[str]:
    width = -(-(int(np.ptp(sizes)) + 1) // _BARS)
    counts = np.bincount((sizes - sizes.min()) // width).tolist()
    for number, count in enumerate(counts):
        low = int(sizes.min()) + number * width
        bar = "#" * round(_BAR_WIDTH * count / max(counts))
        yield f"  {low:8} – {low + width - 1:<8} {bar:<{_BAR_WIDTH}} {count}"


def find_broken_images(paths: Sequence[str], *, progress: bool = True) -> dict[str, str]:
    """Decode every file; the ones that cannot be read, each with the reason, in order."""

    def reason(path: str) -> str | None:
        try:
            read_rgb(path)
        except DECODE_ERRORS as error:
            return f"{type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor(default_threads()) as pool:
        found = tqdm(
            pool.map(reason, paths),
            total=len(paths),
            desc="Reading images",
            unit="file",
            disable=not progress,
        )
        return {path: why for path, why in zip(paths, found, strict=True) if why is not None}


def _describe_pack(dataset: Step37Flickr8kDataset, options: argparse.Namespace) -> Iterator[str]:
    loader = _load(dataset, options, options.packing)
    if not 0 <= options.pack < len(loader):
        raise ValueError(f"--pack: expected 0 to {len(loader) - 1}, got {options.pack}")
    template = dataset.template
    packed = loader[options.pack]
    description = describe_pack(
        packed,
        loader.pieces(options.pack),
        index=options.pack,
        capacity=options.max_length,
        start_tokens={
            IMAGE_ITEM_TYPE: (template.img_start_token_id, template.image_token_count),
            PATCH_ITEM_TYPE: (template.patch_start_token_id, template.patch_token_count),
        },
    )
    labels = packed["labels"]
    trained = [
        "".join(template.tokenizer.decode(labels[a:b].tolist()) for a, b in segment.loss)
        for segment in description.segments
    ]
    yield from _pack_table(description, len(loader), trained)
    if options.out is not None:
        draw_pack(description).save(options.out)
        yield f"picture   {options.out}"


def _pack_table(description: PackDescription, packs: int, trained: Sequence[str]) -> Iterator[str]:
    segments = description.segments
    loss = sum(segment.loss_tokens for segment in segments)
    yield (
        f"pack {description.index} of {packs}: {description.used} of {description.capacity} tokens "
        f"({description.fill:.1%}), {segments[-1].end} with padding, {loss} trained"
    )
    rows = [("segment", "sample", "tokens", "trained", "images", "text trained")]
    for number, (segment, text) in enumerate(zip(segments, trained, strict=True)):
        images = ", ".join(
            f"{Path(image.path).name} {image.start}–{image.end}" for image in segment.images
        )
        rows.append(
            (
                str(number),
                "padding" if segment.source is None else str(segment.source[1]),
                f"{segment.start}–{segment.end}",
                " ".join(f"{a}–{b}" for a, b in segment.loss),
                images,
                repr(text)[1:-1],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[-1]]).rstrip()


if __name__ == "__main__":
    raise SystemExit(main(["inspect", *sys.argv[1:]]))
