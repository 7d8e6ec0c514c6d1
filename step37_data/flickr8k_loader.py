"""Downloads image and caption pairs of Flickr8k (``intro/flickr8k``), or reads a folder like it."""

from __future__ import annotations

import csv
import functools
import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from step37_data.caches.hub_cache import HubFolder, flaw_of, path_inside
from step37_data.caches.rank_order import fill_cache_once
from step37_data.common.checks import checked_int
from step37_data.common.threads import map_threads
from step37_data.images.crops import CropPlan, plan_file
from step37_data.pack_transform import pack_samples
from step37_data.packed_dataloader import MixedPackedDataloader
from step37_data.template import MultimodalSFTSample, Step37MultimodalTemplate
from step37_data.text.messages import CAPTION_PROMPT, caption_dialogue

logger = logging.getLogger(__name__)

_DEFAULT_REPO = "intro/flickr8k"
# Threads that read headers of images. They wait for the file system, not for a core.
_HEADER_READERS = 16
# The most lines of metadata, or missing pictures, that a message names.
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Flickr8kSample:
    """One image file and its caption.

    Raises:
        ValueError: the caption is not a string, or cannot be encoded in UTF-8.
    """

    image_path: str
    caption: str

    def __post_init__(self) -> None:
        try:
            self.caption.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            told = f"expected text without half surrogate pairs, got {self.caption!r}"
            raise ValueError(f"caption of {self.image_path}: {told}") from error


@dataclass(eq=False, repr=False)
class Step37Flickr8kDataset:
    """A data set of image and caption pairs, as conversations of a prompt and an answer, tokenised.

    Args:
        samples: what :func:`prepare_flickr8k_samples` returns; at least one.
        template: turns a conversation into a :class:`MultimodalSFTSample`.
        prompt: the user's text, after the image.
    """

    samples: Sequence[Flickr8kSample]
    template: Step37MultimodalTemplate
    prompt: str

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("samples: expected at least one, got none")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, idx: int) -> MultimodalSFTSample:
        sample = self.samples[idx]
        try:
            return self.template(self._to_dialog(sample, self.prompt))
        except ValueError as error:
            raise ValueError(f"sample {idx} ({sample.image_path}): {error}") from error

    def fingerprint(self) -> str:
        """Identify the template, for the cache of lengths."""
        return self.template.fingerprint()

    def sample_keys(self) -> np.ndarray:
        """Return uint64 ``[N, 2]``: a hash of everything that decides a sample's length.

        That is prompt and caption. With the template's multicrop it is also the size of the
        picture (turned by EXIF if ``as_viewed``), which is read from the header of every file.
        """
        prompt = hashlib.blake2b(self.prompt.encode(), digest_size=16)
        # A user's own template may have no crops.
        plans = self._plans() if getattr(self.template, "multicrop", False) else None
        digests = bytearray()
        for number, sample in enumerate(self.samples):
            digest = prompt.copy()
            digest.update(b"\0" + sample.caption.encode())
            if plans is not None:
                digest.update(b"\0%d %d" % plans[number].size)
            digests += digest.digest()
        return np.frombuffer(bytes(digests), dtype="<u8").reshape(-1, 2)

    def vision_tokens(self) -> np.ndarray:
        """Return int64 ``[N]``: feature rows of each sample, the work of the vision tower."""
        rows = np.full(len(self.samples), self.template.image_token_count, dtype=np.int64)
        if self.template.multicrop:
            rows += [self.template.patch_token_count * len(plan.windows) for plan in self._plans()]
        return rows

    def _plans(self) -> list[CropPlan]:
        rewrite = self.template.path_rewrite_fn or str
        paths = [rewrite(str(sample.image_path)) for sample in self.samples]
        # A user's own template may not have this attribute.
        as_viewed = getattr(self.template, "as_viewed", False)
        plan = functools.partial(plan_file, as_viewed=as_viewed)
        return map_threads(plan, paths, _HEADER_READERS)

    @staticmethod
    def _to_dialog(sample: Flickr8kSample, prompt: str) -> dict[str, Any]:
        conversations = caption_dialogue(sample.caption, prompt)
        return {"images": [sample.image_path], "conversations": conversations}


def pack_captions(
    samples: Sequence[Flickr8kSample],
    template: Step37MultimodalTemplate,
    *,
    prompt: str = CAPTION_PROMPT,
    seqlen_divisible_by: int = 64,
    **settings: Any,
) -> MixedPackedDataloader:
    """Make packs of image and caption pairs; each pair occurs once.

    Args:
        samples: what :func:`prepare_flickr8k_samples` or :func:`read_flickr8k_metadata` returns.
        template: turns a conversation into a sample.
        prompt: the user's text, after the image.
        seqlen_divisible_by: the length of a pack is a multiple of this.
        settings: keywords of :class:`MixedPackedDataloader`; ``max_length`` is required.

    Raises:
        ValueError: as for :class:`MixedPackedDataloader`; or ``seqlen_divisible_by`` is no integer
            of at least 1.
    """
    checked_int("seqlen_divisible_by", seqlen_divisible_by)
    join = functools.partial(
        pack_samples,
        seqlen_divisible_by=seqlen_divisible_by,
        start_token_ids=template.rows_after,
    )
    datasets = [Step37Flickr8kDataset(samples, template, prompt)]
    return MixedPackedDataloader(datasets, [1.0], transform=join, **settings)


def get_flickr8k_dataset_file(
    filename: str,
    *,
    repo_id: str,
    cache_dir: str | Path,
    revision: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Return the path of one file of the data set under ``cache_dir``; download it if missing.

    ``hf_hub_download`` writes to a temporary file and moves it to its place when it is complete. If
    the hub limits requests, breaks off or is down for a moment, the hub's client logs that, waits
    as long as the hub asks it to, and tries again, at most five times in a row. A file that is
    empty, or whose hash differs from the one recorded at its download, is downloaded again.

    Several threads may fetch different files at the same time; processes must take turns (see
    :func:`prepare_flickr8k_samples`).

    Args:
        filename: path inside the data set, with forward slashes.
        repo_id: data set on the hub, such as ``intro/flickr8k``.
        cache_dir: local folder that mirrors the data set.
        revision: branch, tag or commit; None is the default branch.
        endpoint: URL of the hub; None is the one ``huggingface_hub`` is set to.

    Raises:
        ValueError: ``filename`` leaves ``cache_dir``, by its name or by a link.
        FileNotFoundError: the hub has no such file, revision or data set, or is out of reach.
        OSError: after the client's waiting the hub still limits requests or reports a server error,
            or a downloaded file did not match its hash twice.
    """
    folder = HubFolder(repo_id=repo_id, cache_dir=cache_dir, revision=revision, endpoint=endpoint)
    return Path(folder.fetch(filename))


def prepare_flickr8k_samples(
    *,
    repo_id: str = _DEFAULT_REPO,
    split: str = "train",
    sample_count: int | None = 8,
    caption_key: str = "caption_0",
    cache_dir: str | Path = ".cache/step37_flickr8k",
    **hub: Any,
) -> list[Flickr8kSample]:
    """Return the first ``sample_count`` image and caption pairs, in the order of ``metadata.csv``.

    What ``cache_dir`` lacks is downloaded, several files at a time; what is there and fits its hash
    is not asked for again, so a filled cache works offline and an interrupted download continues.
    Of many files the hub is asked for the hashes first, a thousand at a time, and then once for
    each; of a few files, and where a mirror lists nothing, twice for each.
    Files that the loader has not downloaded have no hash, and are taken as they are. In a process
    group only global rank 0 downloads, then one rank of every node whose cache lacks something;
    all return together, or fail together with the error of the rank that failed.

    Your own folder, whose ``metadata.csv`` did not come from the hub, has to be complete: nothing
    is downloaded into it from the default data set. With another ``repo_id``, its missing pictures
    are downloaded from that data set.

    Rows without a caption or file name are skipped, counted and logged.

    Args:
        repo_id: data set on the hub.
        split: folder in it, with ``metadata.csv`` and the images.
        sample_count: how many pairs; None is all.
        caption_key: column of the caption.
        cache_dir: local folder that mirrors the data set; ``~`` is expanded.
        hub: further keywords, about downloads: ``revision`` (branch, tag or
            commit; None is the default branch; one cache folder holds one data set at one
            revision), ``endpoint`` (URL of the hub; None is the one ``huggingface_hub`` is set to),
            ``max_workers`` (files downloaded at a time, 8) and ``progress`` (show a progress bar
            while downloading, True).

    Raises:
        TypeError: a keyword is none of these.
        RuntimeError: no row has both a caption and a file name, or another rank failed.
        ValueError: ``metadata.csv`` cannot be read (see :func:`read_flickr8k_metadata`),
            ``sample_count`` is no integer of at least 1, or ``cache_dir`` holds another data set or
            revision.
        FileNotFoundError: pictures are missing in your own folder; or as below.
        FileNotFoundError, OSError: as for :func:`get_flickr8k_dataset_file`.
    """
    if sample_count is not None:
        checked_int("sample_count", sample_count)
    folder = HubFolder(repo_id=repo_id, cache_dir=cache_dir, **hub)
    listing = f"{split}/metadata.csv"
    metadata = Path(folder.path_of(listing))
    # Read once, when it has been downloaded.
    read = functools.cache(
        functools.partial(read_flickr8k_metadata, metadata, caption_key, sample_count)
    )
    known: dict[str, str] | None = None

    def flawed() -> dict[str, str]:
        """Flaws of images by path; what was found whole is not looked at again."""
        nonlocal known
        paths = dict.fromkeys(sample.image_path for sample in read()) if known is None else known
        known = folder.flaws(list(paths))
        return known

    def fill() -> None:
        own = repo_id == _DEFAULT_REPO and folder.is_own(listing)
        folder.check_origin()
        folder.fetch(listing)
        flaws = flawed()
        if flaws and own:
            raise FileNotFoundError(_told_missing(metadata, flaws))
        if flaws:
            names = [os.path.relpath(path, folder.root) for path in flaws]
            folder.fetch_all(names, f"{repo_id}/{split}")

    def is_filled() -> bool:
        return flaw_of(folder.root, metadata) is None and not flawed()

    fill_cache_once(fill, is_filled, what=f"preparing {repo_id}/{split}")
    samples = read()
    if not samples:
        with metadata.open(encoding="utf-8-sig", newline="") as file:
            columns = next(csv.reader(file), [])
        told = f"no row of {metadata} has a file_name and a {caption_key} (caption_key)"
        raise RuntimeError(f"no sample prepared: {told}; its columns: {columns}")
    return samples


def _told_missing(metadata: Path, flaws: Mapping[str, str]) -> str:
    """Write the message about pictures that are missing in the user's own folder."""
    listed = []
    spell = _Speller()
    for path, flaw in list(flaws.items())[:_SHOWN]:
        hint = spell.similar(str(metadata.parent), os.path.relpath(path, metadata.parent))
        listed.append(f"{path} {flaw}{hint}")
    more = f"; and {len(flaws) - _SHOWN} more" if len(flaws) > _SHOWN else ""
    return (
        f"{metadata} names {len(flaws)} pictures that are missing or empty: {'; '.join(listed)}"
        f"{more}. This metadata.csv did not come from the hub, so nothing is downloaded. To take "
        f"pictures from a data set of the hub, set repo_id; for {_DEFAULT_REPO}, delete the file"
    )


class _Speller:
    """Finds files whose name differs from a missing one only in case or Unicode form."""

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, str]] = {}

    def similar(self, folder: str, name: str) -> str:
        """Return a text that names a file spelt like ``name``; empty if there is none."""
        found: list[str] = []
        for part in name.split("/"):
            inside = "/".join([folder, *found])
            there = self._names(inside)
            if os.path.lexists(f"{inside}/{part}"):
                found.append(part)
            elif _folded(part) in there:
                found.append(there[_folded(part)])
            else:
                return ""
        other = "/".join(found)
        if other == name:
            return ""
        same = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
        how = "in another Unicode form (NFC or NFD)" if same else "in upper or lower case"
        return f" (there is {other!r}: the same name {how})"

    def _names(self, folder: str) -> dict[str, str]:
        if folder not in self._listed:
            try:
                names = os.listdir(folder)
            except OSError:  # not a folder, so there is nothing in it
                names = []
            self._listed[folder] = {_folded(name): name for name in names}
        return self._listed[folder]


def _folded(name: str) -> str:
    """Fold case and Unicode form, so that names which differ only in these become equal."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def read_flickr8k_metadata(
    metadata: Path, caption_key: str = "caption_0", sample_count: int | None = None
) -> list[Flickr8kSample]:
    """Read the image and caption pairs of a ``metadata.csv``; the images need not exist.

    Rows without a caption or file name, such as short rows, are skipped; their number is logged.

    Raises:
        ValueError: ``sample_count`` is no integer of at least 1; a file name leaves the folder of
            ``metadata``; a row has more cells than the header, as after a comma without quotes; a
            quote is never closed; a cell is longer than ``csv.field_size_limit()``; the file is not
            UTF-8. The message names the file and the lines, ten of them at most.
    """
    if sample_count is not None:
        checked_int("sample_count", sample_count)
    samples: list[Flickr8kSample] = []
    skipped = 0
    problems: list[str] = []
    folder = str(metadata.parent)
    for line, file_name, caption in _rows(metadata, caption_key, problems):
        if not caption or not file_name:
            skipped += 1
            continue
        try:
            path = path_inside(folder, file_name)
        except ValueError as error:
            problems.append(f"line {line}: {error}")
            continue
        samples.append(Flickr8kSample(path, caption))
        if len(samples) == sample_count:
            break
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{metadata}, {'; '.join(problems[:_SHOWN])}{more}")
    if skipped:
        logger.warning(f"{metadata}: {skipped} rows without file_name or {caption_key} are skipped")
    return samples


def _rows(metadata: Path, caption_key: str, problems: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yield the number of the last line, the file name and the caption of every row of a CSV file.

    A missing cell gives an empty text. Rows with surplus cells are added to ``problems``.
    """
    with metadata.open(encoding="utf-8-sig", newline="") as file:
        # Strict: otherwise a quote that is not closed includes all rows up to the next quote.
        rows = csv.reader(file, strict=True)
        first = 1
        try:
            header = next(rows, [])
            width = len(header)
            # Of two columns with one name the last is used; a missing column has no cells.
            column = {name: number for number, name in enumerate(header)}
            name_at, caption_at = (column.get(key, width) for key in ("file_name", caption_key))
            nothing = [""] * (width + 1)
            first = rows.line_num + 1
            for cells in rows:
                # A comma at the end of a row makes an empty surplus cell, which does no harm.
                if len(cells) > width and any(cell.strip() for cell in cells[width:]):
                    told = f"expected the {width} cells of the header, got {cells}"
                    problems.append(f"line {rows.line_num}: {told}; quote a text with a comma")
                elif cells:
                    del cells[width:]
                    cells += nothing
                    yield rows.line_num, cells[name_at].strip(), cells[caption_at].strip()
                first = rows.line_num + 1
        except csv.Error as error:
            row = f"line {first}: {error}, in a row read up to line {rows.line_num}"
            raise ValueError(f"{metadata}, {row}; is a quote not closed?") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{metadata}: expected text in UTF-8: {error}") from error


def _is_global_rank_0() -> bool:
    """Whether this process is global rank 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _maybe_barrier() -> None:
    """Wait for all ranks, if there are several."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
