"""Defines the command ``step37-data shard``; it imports the packages it needs when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from step37_data.common.checks import checked_int


def add_to(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command; ``command`` makes its parser, as ``add_parser`` of argparse does."""
    parser = command(
        "shard",
        help="write a folder as WebDataset shards for Megatron-Energon",
        description="Write every split of FOLDER as shards into OUT, the pictures as they are, "
        "with Energon's metadata. A run that was interrupted goes on where it stopped. Shards "
        "whose pictures have changed, in size or time, are written again.",
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("folder", type=Path, help="folder with SPLIT/metadata.csv and pictures")
    add("out", type=Path, help="folder for the shards")
    count = "samples in a shard (%(default)s)"
    add("--samples-per-shard", type=int, default=1000, metavar="N", help=count)


def _run(options: argparse.Namespace) -> Iterator[str]:
    from step37_energon.shards import one_writer, write_shards
    from step37_energon.task_encoder import prepare_shards

    checked_int("--samples-per-shard", options.samples_per_shard)
    if options.sample_count is not None:
        checked_int("--sample-count", options.sample_count)
    with one_writer(options.out):
        shards = write_shards(
            options.folder,
            options.out,
            caption_key=options.caption_key,
            sample_count=options.sample_count,
            samples_per_shard=options.samples_per_shard,
            progress=not options.quiet,
        )
        prepare_shards(options.out, shards)
    for split, counts in shards.items():
        told = f"{sum(counts.values())} samples in {len(counts)} shards"
        yield f"{split:<9} {told} in {options.out / split}"
