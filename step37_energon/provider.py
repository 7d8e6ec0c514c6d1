"""Provides packs from shards, for Megatron-Bridge or for your own training loop."""

from __future__ import annotations

import copy
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron.energon import SavableDataLoader, WorkerConfig, get_savable_loader, get_train_dataset

from step37_data.common.checks import checked_int, checked_state
from step37_data.images.decode import OnBroken
from step37_data.packing import Packing
from step37_data.provider import PackProvider, allow_in_configurations
from step37_energon import Step37TaskEncoder

allow_in_configurations(__name__)


class EnergonPacks(Iterator[dict[str, Any]]):
    """Iterates over packs from Energon's loader, without end; its position can be saved.

    A saved state is the position after the packs that were *used*. Packs that a reader took ahead
    but did not use come again after a restore, if the reader has called :meth:`read_ahead_by`.
    """

    def __init__(self, loader: SavableDataLoader[dict[str, Any]]) -> None:
        self._loader = loader
        self._packs: Generator[dict[str, Any], None, None] | None = None
        self._again: deque[dict[str, Any]] = deque()
        self._unused: deque[Any] = deque()  # restore keys of packs returned, oldest first
        self._used = 0
        self._count_used: Callable[[], int] | None = None
        self._lock = threading.Lock()  # one thread may read ahead while another saves

    def __next__(self) -> dict[str, Any]:
        with self._lock:
            if self._again:
                pack = self._again.popleft()
            else:
                if self._packs is None:
                    self._packs = iter(self._loader)
                pack = next(self._packs)
            self._unused.append(pack["__restore_key__"])
            self._forget_used()
            return pack

    def __del__(self) -> None:
        # Energon's loader and iterator hold references to each other. Without this the garbage
        # collector may close the workers' queues first, and then wait five seconds for each worker.
        if self._packs is not None:
            self._packs.close()

    def read_ahead_by(self, count_used: Callable[[], int]) -> None:
        """Set a function that returns how many of the packs returned from now on have been used."""
        with self._lock:
            self._forget_used()
            self._used, self._count_used = 0, count_used

    def _forget_used(self) -> None:
        if self._count_used is None:
            self._unused.clear()
            return
        used = self._count_used()
        for _ in range(used - self._used):
            self._unused.popleft()
        self._used = used

    def save_state(self) -> dict[str, Any]:
        """Return the position, for :meth:`restore_state` and Megatron-Bridge's checkpoints."""
        with self._lock:
            self._forget_used()
            keys = [*self._unused, *(pack["__restore_key__"] for pack in self._again)]
            # Copied, because Energon changes the lists in it later.
            state = copy.deepcopy(self._loader.save_state_rank())
            for worker in getattr(state, "worker_states", ()):
                # Energon 7.4 may save for a worker that has not begun that a pack was taken.
                if getattr(worker, "offset", 0) == 1 and worker.state is None:
                    worker.offset = 0
            return {"loader": state, "unused": keys, **self._readers()}

    def _readers(self) -> dict[str, int]:
        config = self._loader.worker_config
        return {"num_workers": config.num_workers, "data-parallel size": config.world_size}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Continue after the packs that were used when ``state`` was saved.

        Call it before the first pack is taken.

        Raises:
            ValueError: ``state`` was saved with another number of workers or data-parallel ranks,
                or does not come from :meth:`save_state`.
        """
        checked_state(state, "loader", "unused")
        for name, now in self._readers().items():
            saved = state.get(name, now)
            if saved != now:
                raise ValueError(
                    f"{name}: the state was saved with {saved}, and this run has {now}; Energon "
                    "goes on only with the same number"
                )
        self._loader.restore_state_rank(copy.deepcopy(state["loader"]))
        self._again = deque(map(self._loader.restore_sample, state["unused"]))


@dataclass(kw_only=True)
class Step37EnergonSFTDataProvider(PackProvider):
    """Provides packs from shards for supervised fine-tuning of Step-3.7.

    For a folder instead of shards, use ``Step37Flickr8kSFTDataProvider``. Set it as ``cfg.dataset``
    of a Megatron-Bridge recipe, whose checkpoints then hold the state of the data, or iterate over
    the packs of ``build_datasets(None)`` in your own loop.
    """

    path: str
    """Folder or URL of shards that are prepared for Energon, or of a blend of such folders."""
    tokenizer_path: str
    split: str = "train"
    max_packing_seqlen: int = 2048
    seqlen_divisible_by: int = 64
    packing: Packing = "next_fit"
    packing_buffer_size: int = 256
    """How many samples a worker packs together; it keeps their encoded pictures in memory."""
    multicrop: bool = False
    as_viewed: bool = False
    """Show the model every picture as image viewers do (see ``ImageOptions.as_viewed``)."""
    prompt: str | None = None
    caption_key: str | None = None
    """The key of captions in ``json``, such as ``"caption"``; None reads captions from ``txt``."""
    on_broken: OnBroken = "zero"
    shuffle_buffer_size: int | None = 100
    """Size of the buffer from which Energon draws at random; None draws slice by slice."""
    max_samples_per_sequence: int | None = 100
    """How many samples of a shard are read in a row; None reads whole shards."""

    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = "external"

    def build_datasets(self, context: Any) -> tuple[EnergonPacks, None, None]:
        """Return ``(packs, None, None)``: the packs of this data-parallel rank, no other splits.

        Args:
            context: Megatron-Bridge's build context. If it has no process groups, Megatron's are
                used if it is initialised, and else all ranks of ``torch.distributed``.

        Raises:
            ValueError: a field has a value that is not allowed; the message names it.
        """
        checked_int("num_workers", self.num_workers, least=0)
        checked_int("packing_buffer_size", self.packing_buffer_size)
        for name in ("shuffle_buffer_size", "max_samples_per_sequence"):
            if getattr(self, name) is not None:
                checked_int(name, getattr(self, name))
        encoder = Step37TaskEncoder(
            self.tokenizer_path,
            max_packing_seqlen=self.max_packing_seqlen,
            seqlen_divisible_by=self.seqlen_divisible_by,
            packing=self.packing,
            multicrop=self.multicrop,
            as_viewed=self.as_viewed,
            prompt=self.prompt,
            caption_key=self.caption_key,
            on_broken=self.on_broken,
        )
        self._resolve_special_token_ids(encoder.template)
        group = getattr(getattr(context, "pg_collection", None), "dp", None)
        parallel_state = sys.modules.get("megatron.core.parallel_state")
        if group is None and parallel_state is not None and parallel_state.is_initialized():
            group = parallel_state.get_data_parallel_group()
        dataset = get_train_dataset(
            self.path,
            split_part=self.split,
            worker_config=WorkerConfig.default_worker_config(self.num_workers, group),
            batch_size=1,
            packing_buffer_size=self.packing_buffer_size,
            shuffle_buffer_size=self.shuffle_buffer_size,
            max_samples_per_sequence=self.max_samples_per_sequence,
            task_encoder=encoder,
        )
        return EnergonPacks(get_savable_loader(dataset)), None, None
