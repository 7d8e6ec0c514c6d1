"""The command ``step37-data``: shows the packs of a folder, or writes the folder as shards.

``inspect FOLDER`` describes a data set in lines, in a picture (``--out``) or in an HTML page
(``--html``); with ``--pack N`` it describes one pack, with ``--picture FILE`` one image file.
``shard FOLDER OUT`` writes shards, see :mod:`step37_energon.shard_command`. Both read only the
folder and download nothing.
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import step37_kernels
from step37_data.common.checks import checked_int
from step37_data.common.extras import how_to_get
from step37_energon import shard_command
from step37_inspect import style

if TYPE_CHECKING:
    from step37_data.flickr8k_loader import Flickr8kSample
    from step37_data.packed_dataloader import MixedPackedDataloader

# Unicode's bidirectional classes of characters that change the direction of text.
_DIRECTION_MARKS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``step37-data`` and return its exit status."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that is not UTF-8 shows escapes instead of the dash and the ×.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for line in options.run(options):
            print(_shown_as_text(line))
        return 0
    except (OSError, ValueError) as error:
        print(f"step37-data: {_shown_as_text(str(error))}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"step37-data: {options.command} {how_to_get(error)}", file=sys.stderr)
    return 1


def _shown_as_text(line: str) -> str:
    """Escape control characters, so that a caption or file name cannot control the terminal.

    Also escaped are lone surrogates and marks that change the direction of text. Line breaks and
    tabs are kept.
    """

    def shown(character: str) -> str:
        steers = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        turns = unicodedata.bidirectional(character) in _DIRECTION_MARKS
        return repr(character)[1:-1] if steers or turns else character

    return "".join(map(shown, line))


_INSPECT = """\
Describes the data set: lengths, how full packs get, samples that are too long, images that cannot
be read or that a viewer shows otherwise. With --pack N it describes one pack. Both are lines and,
with --out, a picture; --html writes both, and packs to leaf through, into one page. It reads what
is in the folder and downloads nothing. --picture FILE needs no folder: it shows how multicrop sees
one image file (canvas, windows, token layout)."""


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--sample-count", type=int, metavar="N", help="the first N samples of a split only")
    add("--caption-key", default="caption_0", metavar="COLUMN", help="caption column (%(default)s)")
    add("--quiet", action="store_true", help="no progress bars")
    parser = argparse.ArgumentParser(prog="step37-data")
    version = f"step37-data {step37_kernels.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = functools.partial(commands.add_parser, parents=[common])
    inspect = command("inspect", help="show the packs of a folder", description=_INSPECT)
    inspect.set_defaults(run=_describe)
    add = inspect.add_argument
    add("cache_dir", type=Path, nargs="?", help="folder with SPLIT/metadata.csv and pictures")
    subject = inspect.add_mutually_exclusive_group().add_argument
    subject("--picture", metavar="FILE", help="show how multicrop sees this image file")
    subject("--pack", type=int, metavar="N", help="show this pack instead of the data set")
    subject("--html", type=Path, metavar="FILE", help="write a page with tables, pictures, packs")
    packs_of_page = "packs to leaf through in the page (%(default)s)"
    add("--html-packs", type=int, default=12, metavar="N", help=packs_of_page)
    add("--out", type=Path, metavar="FILE", help="draw it into this file, such as p.png")
    add("--skip-images", action="store_true", help="do not read the images")
    # Options that choose the packs are stored under the names of the provider's fields.
    add("--tokenizer", dest="tokenizer_path", metavar="FOLDER", help="folder of the tokenizer")
    add("--multicrop", action="store_true", help="see images in crops")
    viewed = "see images as viewers show them: turned by EXIF, on white, 8 of 16 bits"
    add("--as-viewed", action="store_true", help=viewed)
    add("--split", default="train", help="folder of the split in it (%(default)s)")
    question = "Describe this image in one sentence."
    add("--prompt", default=question, metavar="TEXT", help="what the user asks (%(default)s)")
    tokens = functools.partial(add, type=int, metavar="TOKENS")
    capacity, multiple = "capacity of a pack (%(default)s)", "a pack is padded to a multiple of it"
    tokens("--max-length", dest="max_packing_seqlen", default=2048, help=capacity)
    multiple += " (%(default)s)"
    tokens("--divisible-by", dest="seqlen_divisible_by", default=64, help=multiple)
    for option, dest, choices, told in (
        ("--oversize", "oversize_policy", ("drop", "extend"), "what happens to longer samples"),
        ("--sampling", "dataset_sampling", ("random", "sequential"), "order of the samples"),
        ("--packing", "packing", ("next_fit", "best_fit", "balanced"), "how samples are packed"),
    ):
        told += " (%(default)s)"
        add(option, dest=dest, choices=choices, default=choices[0], help=told)
    add("--lengths-cache", dest="lengths_cache_dir", metavar="FOLDER", help="keep lengths here")
    shard_command.add_to(command)
    return parser


def _describe(options: argparse.Namespace) -> Iterator[str]:
    if options.out is not None or options.html is not None:
        import matplotlib  # noqa: F401 - if it is missing, say so before pictures are read
    if options.picture is not None:
        from step37_inspect.crop_picture import describe_picture, draw_crops

        yield from describe_picture(options.picture, as_viewed=options.as_viewed)
        draw = functools.partial(draw_crops, as_viewed=options.as_viewed)
        yield from _save(options.out, draw, options.picture)
        return
    if options.cache_dir is None:
        raise ValueError("expected the folder of a data set and --tokenizer, or --picture FILE")
    _check_tokenizer(options.tokenizer_path)
    checked_int("--max-length", options.max_packing_seqlen)
    checked_int("--divisible-by", options.seqlen_divisible_by)
    checked_int("--html-packs", options.html_packs, least=0)
    if options.sample_count is not None:
        checked_int("--sample-count", options.sample_count)
    with tempfile.TemporaryDirectory() as measured_once:
        options.lengths_cache_dir = options.lengths_cache_dir or measured_once
        yield from _describe_data_set(options) if options.pack is None else _describe_pack(options)


def _check_tokenizer(folder: str | None) -> None:
    """Raise ``ValueError`` if no folder is given. A name on the hub would be downloaded."""
    from step37_data.text.tokens import TOKENIZER_FILES

    expected = "the folder of the model's tokenizer, with " + ", ".join(TOKENIZER_FILES)
    if folder is None:
        raise ValueError(f"--tokenizer is missing: {expected}")
    if not Path(folder).is_dir():
        raise ValueError(f"--tokenizer: there is no folder {folder!r}; expected {expected}")


def _describe_pack(options: argparse.Namespace) -> Iterator[str]:
    from step37_inspect.pack_picture import describe_pack, draw_pack, pack_lines

    packs = _packs(options, _read_samples(options))
    if not 0 <= options.pack < len(packs):
        raise ValueError(f"--pack: expected 0 to {len(packs) - 1}, got {options.pack}")
    pack = describe_pack(packs, options.pack)
    yield from pack_lines(pack)
    yield from _save(options.out, draw_pack, pack)


def _save(out: Path | None, draw: Callable[[Any], Any], subject: Any) -> Iterator[str]:
    if out is not None:
        style.save(draw(subject), out)
        yield f"drawing   {out}"


def _read_samples(options: argparse.Namespace) -> Sequence[Flickr8kSample]:
    from step37_data.flickr8k_loader import read_flickr8k_metadata
    from step37_energon.shards import columns_of

    metadata = _metadata(options)
    samples = read_flickr8k_metadata(metadata, options.caption_key, options.sample_count)
    if not samples:
        columns = ", ".join(columns_of(metadata))
        raise ValueError(
            f"{metadata}: no row has a file_name and a {options.caption_key} (--caption-key); its "
            f"columns: {columns}"
        )
    return samples


def _metadata(options: argparse.Namespace) -> Path:
    """Return the path of the split's ``metadata.csv``.

    Raises:
        ValueError: there is no such file; the message shows the layout of a folder.
    """
    folder, split = options.cache_dir, options.split
    metadata: Path = folder / split / "metadata.csv"
    if metadata.is_file():
        return metadata
    if (folder / "metadata.csv").is_file():
        above, name = folder.resolve().parent, folder.resolve().name
        raise ValueError(f"{folder} is a split; give the folder above it: {above} --split {name}")
    others = sorted(path.parent.name for path in folder.glob("*/metadata.csv") if path.is_file())
    told = f"; there are the splits {', '.join(others)} (--split)" if others else ""
    raise ValueError(
        f"{metadata}: there is no such file{told}\nexpected this layout:\n"
        f"  {metadata}    with the columns file_name and {options.caption_key}\n"
        f"  {metadata.with_name('picture.jpg')}     where file_name is picture.jpg"
    )


def _packs(
    options: argparse.Namespace, samples: Sequence[Flickr8kSample], **other: Any
) -> MixedPackedDataloader:
    """Pack the samples as training does; ``other`` overrides options."""
    from step37_data.flickr8k_loader import Step37Flickr8kDataset
    from step37_data.pack_transform import pack_samples
    from step37_data.packed_dataloader import MixedPackedDataloader
    from step37_data.template import Step37MultimodalTemplate

    try:
        template = Step37MultimodalTemplate(
            tokenizer_path=options.tokenizer_path,
            max_sequence_length=options.max_packing_seqlen,
            multicrop=options.multicrop,
            as_viewed=options.as_viewed,
        )
    except ValueError as error:
        raise ValueError(str(error).replace("tokenizer_path", "--tokenizer", 1)) from error
    chosen = {"packing": options.packing, "oversize_policy": options.oversize_policy, **other}
    return MixedPackedDataloader(
        datasets=[Step37Flickr8kDataset(samples, template, options.prompt)],
        epochs=[1.0],
        max_length=options.max_packing_seqlen,
        transform=functools.partial(pack_samples, seqlen_divisible_by=options.seqlen_divisible_by),
        dataset_sampling=options.dataset_sampling,
        lengths_cache_dir=options.lengths_cache_dir,
        progress=not options.quiet,
        **chosen,
    )


def _describe_data_set(options: argparse.Namespace) -> Iterator[str]:
    from step37_inspect import data_set
    from step37_inspect.viewer_difference import find_viewer_differences

    samples = _read_samples(options)
    # All samples, in the order drawn; with "extend" too long ones are packed as well.
    drawn = _packs(options, samples, packing="next_fit", oversize_policy="extend")
    order, sizes = drawn.piece_indices, drawn.piece_sizes
    paths = list(dict.fromkeys(sample.image_path for sample in samples))
    broken, otherwise = None, {}
    if not options.skip_images:
        broken = data_set.find_broken_images(paths, options.quiet)
        otherwise = find_viewer_differences(paths, options.quiet)
    balanced = options.packing == "balanced"
    metadata = _metadata(options)
    data = data_set.DataSetDescription(
        name=f"{options.cache_dir}/{options.split}, {options.caption_key}",
        sizes=sizes,
        images=len(paths),
        capacity=drawn.max_length,
        oversize=options.oversize_policy,
        broken=broken,
        loads=drawn.datasets[0].vision_tokens()[order] if balanced else None,
        files=[samples[index].image_path for index in order.tolist()],
        shown_otherwise=otherwise,
        as_viewed=options.as_viewed,
        skipped_rows=data_set.skipped_rows(metadata, options.caption_key, options.sample_count),
    )
    yield from data_set.data_set_lines(data)
    yield from _save(options.out, data_set.draw_data_set, data)
    if options.html is not None:
        from step37_inspect.page import write_page

        total = len(data.fills[options.packing].tokens)
        packs = _packs(options, samples) if total else None
        shown = range(min(options.html_packs, total))
        write_page(
            options.html,
            data,
            packs,
            shown=shown,
            settings=_settings(options),
            progress=not options.quiet,
        )
        yield f"page      {options.html}, {len(shown)} of {total} packs"


def _settings(options: argparse.Namespace) -> dict[str, str]:
    """Return the settings with which a report was made, to be shown in it."""
    count, multiple = options.sample_count, options.seqlen_divisible_by
    return {
        "date": f"{datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC",
        "version": f"step37 {step37_kernels.__version__}",
        "tokenizer": str(options.tokenizer_path),
        "samples": "all" if count is None else f"the first {count}",
        "prompt": options.prompt,
        "pictures": "in crops besides the full image" if options.multicrop else "the full image",
        "pixels": "as viewers show them" if options.as_viewed else "as stock reads them",
        "packs": f"{options.max_packing_seqlen} tokens, padded to a multiple of {multiple}",
        "longer samples": options.oversize_policy,
        "sampling": options.dataset_sampling,
        "packing": options.packing,
    }


if __name__ == "__main__":
    raise SystemExit(main(["inspect", *sys.argv[1:]]))
