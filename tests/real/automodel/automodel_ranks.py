"""Two gloo ranks with Automodel's own sharding and pipeline: what each returns."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from nemo_automodel.components.datasets.vlm.pp_media import (
    stage_vlm_media_for_pp as stock_stage,
)
from nemo_automodel.components.datasets.vlm.pp_media import (
    wrap_vlm_collate_for_pp as stock_wrap,
)
from nemo_automodel.components.distributed.pipelining import AutoPipeline
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from step37_data.pp_media import stage_vlm_media_for_pp, wrap_vlm_collate_for_pp
from step37_kernels.automodel import FusedMerge, patch_step3p7, replace_in, unpatch_step3p7
from tests.real.automodel.automodel_model import LENGTH, batch, build

STEPS, MICROBATCHES = 2, 2
# Of each rank in each step, or of the whole batch. Crops on every rank: FSDP gathers the tower's
# blocks once for them, and the ranks have to gather together.
CROPS = [[2, 0], [1, 3], [0, 4], [1, 0]]
HOWS = ("stock", "patched", "replaced", "kernels")


def made(how: str) -> Any:
    if how in ("patched", "kernels"):
        patch_step3p7(impl="triton" if how == "kernels" else "torch")
    model = build()
    unpatch_step3p7()
    assert isinstance(model.model, FusedMerge) == (how in ("patched", "kernels"))
    return model


def sum_of_losses(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def shard(model: Any) -> None:
    """In the units in which Automodel's parallelizer does it, the projector one of its own."""
    mesh = init_device_mesh("cpu", (2,))
    inner = model.model
    for layer in inner.language_model.layers.values():
        fully_shard(layer, mesh=mesh)
    for block in inner.vision_model.transformer.resblocks:
        fully_shard(block, mesh=mesh)
    for module in (inner.vit_large_projector, inner, model):
        fully_shard(module, mesh=mesh)


def fsdp(rank: int) -> dict[str, list[dict[str, Tensor]]]:
    """By the class in place: gradients in full and the loss of both ranks, step by step."""
    return {how: _train_sharded(rank, how) for how in HOWS}


def _train_sharded(rank: int, how: str) -> list[dict[str, Tensor]]:
    model = made(how)
    shard(model)
    if how == "replaced":
        assert replace_in(model, impl="torch") == ("model",)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    for step in range(STEPS):
        inputs = batch(2 * step + rank, CROPS[2 * step + rank])
        loss = sum_of_losses(model(**inputs), inputs["input_ids"])
        loss.backward()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        steps.append(
            {name: p.grad.full_tensor() for name, p in model.named_parameters()} | {"loss": total}
        )
        optimizer.step()
        optimizer.zero_grad()
    return steps


def whole(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The same by one process with the stock class; FSDP averages over the ranks."""
    model = build().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    for step in range(STEPS):
        losses = []
        for rank in (0, 1):
            inputs = batch(2 * step + rank, CROPS[2 * step + rank])
            losses.append(sum_of_losses(model(**inputs), inputs["input_ids"]))
        (sum(losses) / 2).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        steps.append(grads | {"loss": sum(losses).detach()})
        optimizer.step()
        optimizer.zero_grad()
    return steps


def pipeline(rank: int, schedule: str) -> dict[str, list[dict[str, Tensor]]]:
    """Gradients of this rank's stage, and the loss on the last, step by step."""
    del rank
    results = {}
    for how in HOWS:
        for ours in (False, True):
            name = f"{how}, {'our' if ours else 'its'} media"
            results[name] = _train_in_stages(how, ours, schedule)
    return results


def _train_in_stages(how: str, ours: bool, schedule: str) -> list[dict[str, Tensor]]:
    model = made(how)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    pp = AutoPipeline(
        world_mesh=mesh,
        pp_schedule=schedule,
        pp_microbatch_size=1,
        pp_batch_size=MICROBATCHES,
        pp_seq_len=LENGTH,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pp.build(model, loss_fn=sum_of_losses)
    if how == "replaced":
        names = replace_in(pp.parts, impl="torch")
        assert names == ("0.model",)
    stage, wrap = (
        (stage_vlm_media_for_pp, wrap_vlm_collate_for_pp) if ours else (stock_stage, stock_wrap)
    )
    collate = wrap(lambda crops: batch(len(crops) + sum(crops), crops), n_microbatches=MICROBATCHES)
    optimizer = torch.optim.SGD([p for part in pp.parts for p in part.parameters()], lr=0.1)
    steps = []
    for crops in (CROPS[1], CROPS[0]):
        inputs = dict(collate(crops))
        ids = inputs.pop("input_ids")
        losses: list[Tensor] | None = [] if pp.info.has_last_stage else None
        pp.update_seq_len(LENGTH)
        with stage(pp, pp.parts, inputs):
            pp.step(ids, target=ids if losses is not None else None, losses=losses, **inputs)
        (part,) = pp.parts
        steps.append({n: p.grad.clone() for n, p in part.named_parameters() if p.grad is not None})
        if losses is not None:
            steps[-1]["loss"] = torch.stack(losses).sum().detach()
        optimizer.step()
        optimizer.zero_grad()
    return steps


def unsplit(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    model = build().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    for crops in (CROPS[1], CROPS[0]):
        inputs = batch(len(crops) + sum(crops), crops)
        loss = sum_of_losses(model(**inputs), inputs["input_ids"])
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        steps.append(grads | {"loss": loss.detach()})
        optimizer.step()
        optimizer.zero_grad()
    return steps
