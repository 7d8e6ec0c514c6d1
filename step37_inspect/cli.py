"""The command ``step37-data``: ``inspect`` the packs of a cache folder, or ``shard`` the folder.

Without ``--pack``, ``inspect`` describes the data set (lengths, fill of both packings, dropped
samples, broken images); with ``--pack N`` one pack. Both are a table and, with ``--out``, a
picture; ``--html`` writes both, and packs to leaf through, into one page. It reads what is in the
folder and downloads nothing. ``--picture FILE`` needs no folder: it shows how multicrop sees one
image file (canvas, windows, token layout).
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step37_data.common.extras import how_to_get
from step37_energon import shard_command
from step37_inspect import style

if TYPE_CHECKING:
    from step37_data.packed_dataloader import MixedPackedDataloader, Packing

# Characters that turn the direction of text, by their bidirectional class in Unicode.
_DIRECTION_MARKS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``step37-data``; returns the exit status."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that is not UTF-8 has no dash and no ×; it shows an escape in their place.
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
    """Write control characters as escapes: a caption or a file name must not steer the terminal.

    Covered are the control characters but for line breaks and tabs, lone surrogates, and the marks
    that turn the direction of text.
    """

    def shown(character: str) -> str:
        steers = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        turns = unicodedata.bidirectional(character) in _DIRECTION_MARKS
        return repr(character)[1:-1] if steers or turns else character

    return "".join(map(shown, line))


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--sample-count", type=int, metavar="N", help="the first N samples of a split only")
    add("--caption-key", default="caption_0", metavar="COLUMN")
    add("--quiet", action="store_true", help="no progress bars")
    parser = argparse.ArgumentParser(prog="step37-data")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    defaults = argparse.ArgumentDefaultsHelpFormatter
    command = functools.partial(commands.add_parser, parents=[common], formatter_class=defaults)
    told = (__doc__ or "").partition("\n\n")[2]
    inspect = command("inspect", help="show the packs of a cache folder", description=told)
    inspect.set_defaults(run=_describe)
    add = inspect.add_argument
    add("cache_dir", type=Path, nargs="?", help="folder in the layout of the data set")
    subject = inspect.add_mutually_exclusive_group().add_argument
    subject("--picture", metavar="FILE", help="show how multicrop sees this image file")
    subject("--pack", type=int, metavar="N", help="show this pack instead of the data set")
    subject("--html", type=Path, metavar="FILE", help="write a page with tables, pictures, packs")
    add("--html-packs", type=int, default=12, metavar="N", help="packs to leaf through in it")
    add("--out", type=Path, metavar="FILE", help="draw it into this file, such as p.png")
    add("--skip-images", action="store_true", help="do not read every image to find broken ones")
    # Those that choose the packs have the names of the provider's fields.
    add("--tokenizer", dest="tokenizer_path", metavar="FOLDER", help="folder of the tokenizer")
    add("--multicrop", action="store_true", help="see images in crops")
    add("--split", default="train")
    add("--prompt", default="Describe this image in one sentence.")
    tokens = functools.partial(add, type=int, metavar="TOKENS")
    tokens("--max-length", dest="max_packing_seqlen", default=2048, help="capacity of a pack")
    tokens("--divisible-by", dest="seqlen_divisible_by", default=64, help="multiple padded to")
    add("--oversize", dest="oversize_policy", choices=("drop", "extend"), default="drop")
    add("--sampling", dest="dataset_sampling", choices=("random", "sequential"), default="random")
    add("--packing", choices=("next_fit", "best_fit"), default="next_fit")
    add("--lengths-cache", dest="lengths_cache_dir", metavar="FOLDER", help="keep lengths here")
    shard_command.add_to(command)
    return parser


def _describe(options: argparse.Namespace) -> Iterator[str]:
    if options.picture is not None:
        from step37_inspect.crop_picture import describe_picture, draw_crops

        yield from describe_picture(options.picture)
        yield from _save(options.out, draw_crops, options.picture)
    elif options.cache_dir is None or options.tokenizer_path is None:
        raise ValueError("expected a cache folder and --tokenizer, or --picture FILE")
    elif options.pack is not None:
        from step37_inspect.pack_picture import describe_pack, draw_pack, pack_lines

        packs = _packs(options, options.packing)
        if not 0 <= options.pack < len(packs):
            raise ValueError(f"--pack: expected 0 to {len(packs) - 1}, got {options.pack}")
        pack = describe_pack(packs, options.pack)
        yield from pack_lines(pack)
        yield from _save(options.out, draw_pack, pack)
    else:
        yield from _describe_data_set(options)


def _save(out: Path | None, draw: Callable[[Any], Any], subject: Any) -> Iterator[str]:
    if out is not None:
        style.save(draw(subject), out)
        yield f"drawing   {out}"


def _packs(options: argparse.Namespace, packing: Packing) -> MixedPackedDataloader:
    """Packs as training sees them, of the files that are there."""
    from step37_data.flickr8k_loader import Step37Flickr8kDataset, read_flickr8k_metadata
    from step37_data.pack_transform import pack_samples
    from step37_data.packed_dataloader import MixedPackedDataloader
    from step37_data.template import Step37MultimodalTemplate

    metadata = options.cache_dir / options.split / "metadata.csv"
    samples = read_flickr8k_metadata(metadata, options.caption_key, options.sample_count)
    if not samples:
        raise ValueError(f"{metadata}: no row has a file_name and a {options.caption_key}")
    template = Step37MultimodalTemplate(
        tokenizer_path=options.tokenizer_path,
        max_sequence_length=options.max_packing_seqlen,
        multicrop=options.multicrop,
    )
    return MixedPackedDataloader(
        [Step37Flickr8kDataset(samples, template, options.prompt)],
        [1.0],
        options.max_packing_seqlen,
        options.oversize_policy,
        functools.partial(pack_samples, seqlen_divisible_by=options.seqlen_divisible_by),
        options.dataset_sampling,
        packing=packing,
        lengths_cache_dir=options.lengths_cache_dir,
        progress=not options.quiet,
    )


def _describe_data_set(options: argparse.Namespace) -> Iterator[str]:
    from step37_inspect import data_set

    # In the order drawn. Dropped samples are among them.
    packs = _packs(options, "next_fit")
    paths = list(dict.fromkeys(sample.image_path for sample in packs.datasets[0].samples))
    data = data_set.DataSetDescription(
        name=f"{options.cache_dir}/{options.split}, {options.caption_key}",
        sizes=packs.piece_sizes,
        images=len(paths),
        capacity=packs.max_length,
        oversize=options.oversize_policy,
        broken=None if options.skip_images else data_set.find_broken_images(paths, options.quiet),
    )
    yield from data_set.data_set_lines(data)
    yield from _save(options.out, data_set.draw_data_set, data)
    if options.html is not None:
        from step37_inspect.page import write_page

        if options.packing != "next_fit":
            packs = _packs(options, options.packing)
        shown = range(min(options.html_packs, len(packs)))
        write_page(options.html, data, packs, shown=shown, progress=not options.quiet)
        yield f"page      {options.html}, {len(shown)} of {len(packs)} packs"


if __name__ == "__main__":
    raise SystemExit(main(["inspect", *sys.argv[1:]]))
