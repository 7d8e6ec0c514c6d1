"""Flickr8k (``intro/flickr8k``): fetch its files once, then read image and caption pairs."""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm.contrib.concurrent import thread_map

from step37_data.caches.hub_cache import NOTES, check_origin, flaw_of, path_inside, refuse_links
from step37_data.caches.rank_order import fill_cache_once
from step37_data.common.checks import checked_int
from step37_data.common.threads import map_threads
from step37_data.images.crops import CropPlan, plan_file
from step37_data.template import MultimodalSFTSample, Step37MultimodalTemplate
from step37_data.text.tokens import IMAGE_PLACEHOLDER

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.5
_GIVE_UP_AFTER_S = 30.0
# They wait for the file system, not for a core.
_HEADER_READERS = 16
# Lines of metadata in a message.
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Flickr8kSample:
    """One image file and its caption.

    Raises:
        ValueError: the caption is no text, or text that UTF-8 cannot hold.
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
    """Image and caption pairs as tokenised conversations: the prompt asks, the caption answers.

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
        """Names the template, for the cache of lengths."""
        return self.template.fingerprint()

    def sample_keys(self) -> np.ndarray:
        """uint64 ``[N, 2]``: what decides a sample's length, hashed.

        Prompt and caption; with the template's multicrop the picture's size too, for which the
        header of every file is read.
        """
        prompt = hashlib.blake2b(self.prompt.encode(), digest_size=16)
        # A template of the user's own need not know of crops.
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
        """int64 ``[N]``: rows of all images and crops of a sample, the work of the vision tower."""
        rows = np.full(len(self.samples), self.template.image_token_count, dtype=np.int64)
        if self.template.multicrop:
            rows += [self.template.patch_token_count * len(plan.windows) for plan in self._plans()]
        return rows

    def _plans(self) -> list[CropPlan]:
        rewrite = self.template.path_rewrite_fn or str
        paths = [rewrite(str(sample.image_path)) for sample in self.samples]
        return map_threads(plan_file, paths, _HEADER_READERS)

    @staticmethod
    def _to_dialog(sample: Flickr8kSample, prompt: str) -> dict[str, Any]:
        return {
            "images": [sample.image_path],
            "conversations": [
                {"role": "user", "content": f"{IMAGE_PLACEHOLDER}\n{prompt}"},
                {"role": "assistant", "content": sample.caption},
            ],
        }


def get_flickr8k_dataset_file(
    filename: str,
    *,
    repo_id: str,
    cache_dir: str | Path,
    revision: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Path of one file of the data set under ``cache_dir``, downloaded if it is not there.

    ``hf_hub_download`` writes beside the final place and moves the whole file there. A download
    that fails in passing (connection, 408, 429, 5xx, a wrong length) is tried again: five times in
    all, with 7.5 seconds of pauses, and not after half a minute. A file that is empty, or whose
    hash is not the one that the hub gave when it was downloaded, is downloaded again.

    Threads may fetch different files at a time; processes must take turns (see
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
        OSError: the download failed otherwise, or gave what does not fit its hash, twice.
    """
    root = Path(cache_dir).expanduser()
    path = path_inside(root, filename)
    for downloads in range(3):
        flaw = flaw_of(root, path)
        if flaw is None:
            return path
        if downloads < 2:
            _download(filename, root, path, flaw, repo_id, revision=revision, endpoint=endpoint)
    raise OSError(f"{path} {flaw}, also after it was downloaded twice from {repo_id}")


def _download(
    filename: str, root: Path, path: Path, flaw: str, repo_id: str, **source: Any
) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    refuse_links(root, path, root / NOTES)
    if path.exists():
        logger.warning("%s %s: downloading it again", path, flaw)
    # Errors of the HTTP library below huggingface_hub (requests or httpx, by its version), all
    # OSError or children of the base class of HfHubHTTPError.
    network_errors = (OSError, HfHubHTTPError.__bases__[0])
    began = time.monotonic()
    for attempt in itertools.count(1):
        try:
            hf_hub_download(
                repo_id,
                filename,
                repo_type="dataset",
                local_dir=root,
                # Else the client keeps a damaged file that has its name, and tries again itself,
                # within each attempt of ours, where the hub answers with an error.
                force_download=True,
                **source,
            )
            return
        except (*network_errors, ValueError) as raised:
            # So the client reports that it found out nothing about the file.
            unreachable = isinstance(raised, ValueError)
            error = raised.__cause__ if unreachable else raised
            if not isinstance(error, network_errors):
                raise
            status = getattr(getattr(error, "response", None), "status_code", None)
            offline = isinstance(error, OfflineModeIsEnabled)
            may_pass = status is None or status in (408, 429) or status >= 500
            in_time = attempt < _ATTEMPTS and time.monotonic() - began < _GIVE_UP_AFTER_S
            if in_time and may_pass and not offline:
                logger.warning("%s/%s: attempt %d failed (%s)", repo_id, filename, attempt, error)
                time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
                continue
            # A built-in error, which every rank can raise. The hub tells nobody of a private repo.
            missing = unreachable or isinstance(error, FileNotFoundError) or status in (401, 404)
            kind = FileNotFoundError if missing else OSError
            tried = f" after {attempt} attempts" if attempt > 1 else ""
            raise kind(
                f"{path} {flaw}, and {repo_id}/{filename} could not be downloaded{tried}: {error}"
            ) from error


def prepare_flickr8k_samples(
    *,
    repo_id: str = "intro/flickr8k",
    split: str = "train",
    sample_count: int | None = 8,
    caption_key: str = "caption_0",
    cache_dir: str | Path = ".cache/step37_flickr8k",
    revision: str | None = None,
    endpoint: str | None = None,
    max_workers: int = 8,
    progress: bool = True,
) -> list[Flickr8kSample]:
    """The first ``sample_count`` image and caption pairs, in the order of ``metadata.csv``.

    What ``cache_dir`` lacks is downloaded, several files at a time; what is there and fits its hash
    is not asked for again, so a filled cache works offline and an interrupted download continues.
    Files that the loader has not downloaded have no hash, and are taken as they are. In a process
    group only global rank 0 downloads, then one rank of every node whose cache lacks something;
    all return together, or fail together with the error of the rank that failed.

    Rows without a caption or file name are skipped, counted and logged.

    Args:
        repo_id: data set on the hub.
        split: folder in it, with ``metadata.csv`` and the images.
        sample_count: how many pairs; None is all.
        caption_key: column of the caption.
        cache_dir: local folder that mirrors the data set; ``~`` is expanded.
        revision: branch, tag or commit; None is the default branch. One cache folder holds one
            data set at one revision.
        endpoint: URL of the hub; None is the one ``huggingface_hub`` is set to.
        max_workers: files downloaded at a time.
        progress: show a progress bar while downloading.

    Raises:
        RuntimeError: no row has both a caption and a file name, or another rank failed.
        ValueError: ``metadata.csv`` cannot be read (see :func:`read_flickr8k_metadata`),
            ``sample_count`` is no integer of at least 1, or ``cache_dir`` holds another data set or
            revision.
        FileNotFoundError, OSError: as for :func:`get_flickr8k_dataset_file`.
    """
    if sample_count is not None:
        checked_int("sample_count", sample_count)
    root = Path(cache_dir).expanduser()
    metadata = path_inside(root, f"{split}/metadata.csv")

    def fetch(name: str) -> Path:
        return get_flickr8k_dataset_file(
            name, repo_id=repo_id, cache_dir=root, revision=revision, endpoint=endpoint
        )

    # Read once, as soon as it is there.
    read = functools.cache(
        functools.partial(read_flickr8k_metadata, metadata, caption_key, sample_count)
    )

    def fill() -> None:
        from huggingface_hub import utils as hub

        root.mkdir(parents=True, exist_ok=True)
        check_origin(root, repo_id, revision)
        with contextlib.ExitStack() as undo:
            # huggingface_hub shows a bar for every file; our files together have one.
            if not hub.are_progress_bars_disabled():
                hub.disable_progress_bars()
                undo.callback(hub.enable_progress_bars)
            fetch(f"{split}/metadata.csv")
            names = [path.relative_to(root).as_posix() for path in flawed()]
            if names:
                logger.info("downloading %d files of %s/%s", len(names), repo_id, split)
                bar = {"desc": f"Downloading {repo_id}/{split}", "unit": "file"}
                # After a failure it starts no other file.
                thread_map(fetch, names, max_workers=max_workers, disable=not progress, **bar)

    whole: set[Path] = set()

    def flawed() -> list[Path]:
        """Images that are missing or damaged; what was found whole is not looked at again."""
        paths = list(dict.fromkeys(Path(sample.image_path) for sample in read()))
        paths = [path for path in paths if path not in whole]
        flaws = map_threads(functools.partial(flaw_of, root), paths, _HEADER_READERS)
        found = dict(zip(paths, flaws, strict=True))
        whole.update(path for path, flaw in found.items() if flaw is None)
        return [path for path, flaw in found.items() if flaw is not None]

    def is_filled() -> bool:
        return flaw_of(root, metadata) is None and not flawed()

    fill_cache_once(fill, is_filled, what=f"preparing {repo_id}/{split}")
    samples = read()
    if not samples:
        with metadata.open(encoding="utf-8-sig", newline="") as file:
            columns = next(csv.reader(file), [])
        told = f"no row of {metadata} has a file_name and a {caption_key}; its columns: {columns}"
        raise RuntimeError(f"no sample prepared: {told}")
    return samples


def read_flickr8k_metadata(
    metadata: Path, caption_key: str = "caption_0", sample_count: int | None = None
) -> list[Flickr8kSample]:
    """Image and caption pairs that a ``metadata.csv`` lists, whether or not the images are there.

    Rows without a caption or file name, short ones among them, are skipped; how many is logged.

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
    for line, row in _rows(metadata, problems):
        caption = row.get(caption_key, "").strip()
        file_name = row.get("file_name", "").strip()
        if not caption or not file_name:
            skipped += 1
            continue
        try:
            path = path_inside(metadata.parent, file_name)
        except ValueError as error:
            problems.append(f"line {line}: {error}")
            continue
        samples.append(Flickr8kSample(str(path), caption))
        if len(samples) == sample_count:
            break
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{metadata}, {'; '.join(problems[:_SHOWN])}{more}")
    if skipped:
        logger.warning(f"{metadata}: {skipped} rows without file_name or {caption_key} are skipped")
    return samples


def _rows(metadata: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Every row of a CSV file, with the number of its last line; rows too long are ``problems``."""
    with metadata.open(encoding="utf-8-sig", newline="") as file:
        # Strict: else a quote that is not closed takes in all rows up to the next one.
        rows = csv.reader(file, strict=True)
        first = 1
        try:
            header = next(rows, [])
            first = rows.line_num + 1
            for cells in rows:
                # A comma at the end of a row makes an empty cell, which holds no text to lose.
                if any(cell.strip() for cell in cells[len(header) :]):
                    told = f"expected the {len(header)} cells of the header, got {cells}"
                    problems.append(f"line {rows.line_num}: {told}; quote a text with a comma")
                elif cells:
                    yield rows.line_num, dict(zip(header, cells, strict=False))
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
