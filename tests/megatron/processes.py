"""megatron-core in several gloo processes on the CPU, with a time limit and clean ends."""

from __future__ import annotations

import contextlib
import io
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from tests import ptx
from tests.fork_server import fork_server
from tests.limits import HANGS_AFTER_S, end_with_parent


class CudaMeansCpu(TorchFunctionMode):
    """``device="cuda"``, as Megatron's pipeline schedules say, is the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def let_the_cpu_play_the_gpu(patch: pytest.MonkeyPatch) -> None:
    """Take four assumptions of megatron-core away; no value depends on any.

    It asks for the current CUDA device wherever it allocates, only to hand the answer on as
    ``device=``; it waits for the device after communication; it asks for the current stream before
    a reduction, to order it behind events that only CUDA graphs record; and it forks the CUDA
    random state around a dropout that is off here.
    """
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    patch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)
    patch.setattr(torch.cuda, "current_stream", lambda: None)
    patch.setattr(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())


def start_megatron(store: str, rank: int, world: int, **parallel: Any) -> None:
    """Process groups of ``initialize_model_parallel(**parallel)`` over gloo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=HANGS_AFTER_S / 2),
    )
    parallel_state.initialize_model_parallel(**parallel)


def stop_megatron() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def run(work: Callable[..., Any], *arguments: Any, world: int = 2, **parallel: Any) -> list[Any]:
    """What ``work(rank, *arguments)`` returns in each of ``world`` new Megatron processes.

    Raises:
        AssertionError: a process failed (with its traceback) or did not come to an end.
    """
    context = fork_server()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes, processes = [], []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(sender, store, rank, world, parallel, work, arguments)
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            answers = [_answer(pipe, rank) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
                    process.join()
    failures = [text for text, _ in answers if text]
    assert not failures, "\n".join(failures)
    return [value for _, value in answers]


def _answer(pipe: Any, rank: int) -> tuple[str, Any]:
    if not pipe.poll(HANGS_AFTER_S):
        return f"rank {rank}: no answer within {HANGS_AFTER_S} s", None
    try:
        received = pipe.recv_bytes()
    except EOFError:
        return f"rank {rank}: died", None
    return torch.load(io.BytesIO(received), weights_only=False)


def _child(
    sender: Any,
    store: str,
    rank: int,
    world: int,
    parallel: dict[str, Any],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    ptx.install_if_asked()
    try:
        let_the_cpu_play_the_gpu(pytest.MonkeyPatch())
        start_megatron(store, rank, world, **parallel)
        with CudaMeansCpu():
            answer = "", work(rank, *arguments)
        stop_megatron()
    except BaseException:
        answer = f"rank {rank}: {traceback.format_exc()}", None
    # Tensors in a pipe would need their sender alive when they are read.
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    sender.send_bytes(buffer.getvalue())
