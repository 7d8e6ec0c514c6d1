"""Two gloo ranks with Automodel's own sharding, pipeline and recipe: what each returns."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nemo_automodel.components.distributed.pipelining import AutoPipeline
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.moe.parallelizer import apply_fsdp
from nemo_automodel.components.utils.model_utils import filter_forward_kwargs
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor.experimental._context_parallel import _attention

from step37_kernels.automodel import FusedMerge, patch_step3p7, replace_in, unpatch_step3p7
from step37_kernels.integration.patching import is_fsdp_unit
from tests.real.automodel import automodel_recipe
from tests.real.automodel.automodel_model import batch, build
from tests.real.automodel.automodel_recipe import LENGTH, model_options

STEPS, MICROBATCHES = 2, 2
# Of each rank in each step, or of the whole batch. Crops on every rank: FSDP gathers the tower's
# blocks once for them, and the ranks have to gather together.
CROPS = [[2, 0], [1, 3], [0, 4], [1, 0]]
HOWS = ("stock", "patched", "replaced", "kernels")
MEDIA = ("its media", "our media")
SCHEDULES = ("GPipe", "1F1B")
RATE = 0.1


def made(how: str, **options: Any) -> Any:
    if how in ("patched", "kernels"):
        patch_step3p7(impl="triton" if how == "kernels" else "torch")
    model = build(**options)
    unpatch_step3p7()
    assert isinstance(model.model, FusedMerge) == (how in ("patched", "kernels"))
    return model


def sum_of_losses(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def shard(model: Any, mesh: DeviceMesh) -> None:
    """As its parallelizer does it; the projector is a unit of its own."""
    apply_fsdp(model, mesh, False, False, mp_policy=MixedPrecisionPolicy())
    assert isinstance(model.model.vit_large_projector, FSDPModule)


def fsdp(rank: int) -> dict[str, list[dict[str, Tensor]]]:
    """By the class in place: gradients in full and the loss of both ranks, step by step."""
    return {how: _train_sharded(rank, how) for how in HOWS}


def _train_sharded(rank: int, how: str) -> list[dict[str, Tensor]]:
    model = made(how)
    shard(model, init_device_mesh("cpu", (2,)))
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


class _Stream:
    """In place of a CUDA stream, for Megatron-FSDP on the CPU, where all runs in order."""

    device = torch.device("cpu")

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self) -> object:
        return object()


def megatron_fsdp(rank: int) -> dict[str, dict[str, Tensor]]:
    """By the class in place: gradients in full of one step, sharded by Megatron-FSDP's
    experimental ``fully_shard``, and the loss of both ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "current_stream", lambda *_: _Stream())
        for name in ("stream", "device"):
            patch.setattr(torch.cuda, name, contextlib.nullcontext)
        for name in ("range_push", "range_pop"):
            patch.setattr(torch.cuda.nvtx, name, lambda *_: None)
        return {how: _step_of_megatron_fsdp(rank, how) for how in HOWS}


def _step_of_megatron_fsdp(rank: int, how: str) -> dict[str, Tensor]:
    from megatron.core.distributed.fsdp.src.megatron_fsdp import experimental

    model = made(how)
    flat = [experimental.Flat()]
    placements = experimental.Placements(dp_axes=[0], parameter=flat, gradient=flat, optimizer=flat)
    mesh = init_device_mesh("cpu", (2,))
    # megatron-core's main branch wants its modules made within a context; 0.19.2 has none.
    with getattr(experimental, "fully_shard_context", contextlib.nullcontext)():
        for part in (model.model.vit_large_projector, model.model, model):
            experimental.fully_shard(part, mesh, placements)
            assert is_fsdp_unit(part)
    if how == "replaced":
        assert replace_in(model, impl="torch") == ("model",)
    inputs = batch(rank, CROPS[rank])
    loss = sum_of_losses(model(**inputs), inputs["input_ids"])
    loss.backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    gradients = {}
    for prefix, module in model.named_modules():
        for group in module.parameter_groups if is_fsdp_unit(module) else ():
            full = group.main_grad.redistribute([experimental.Replicate()])
            for i, name in enumerate(group.parameter_names):
                gradients[f"{prefix}.{name}".lstrip(".")] = full.get_local_tensor(i)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    return gradients | {"loss": total}


def whole(how: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The same by one process; FSDP averages over the ranks."""
    model = made(how).to(dtype)
    if how == "replaced":
        assert replace_in(model, impl="torch") == ("model",)
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


def pipelines(rank: int) -> dict[str, list[dict[str, Tensor]]]:
    """Gradients of this rank's stage, and the loss on the last, step by step."""
    del rank
    results = {}
    for media in MEDIA:
        with automodel_recipe.our_media(media == "our media"):
            batches = automodel_recipe.batches(MICROBATCHES)
            for schedule, how in itertools.product(SCHEDULES, HOWS):
                name = f"{schedule}, {how}, {media}"
                results[name] = _train_in_stages(how, schedule, batches)
    return results


def _train_in_stages(how: str, schedule: str, batches: list[Any]) -> list[dict[str, Tensor]]:
    mesh = automodel_recipe.mesh(pp=2)
    pp = AutoPipeline(
        world_mesh=mesh,
        pp_schedule=schedule,
        pp_microbatch_size=1,
        pp_batch_size=MICROBATCHES,
        pp_seq_len=LENGTH - 1,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    model = made(how, **model_options())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pp.build(model, loss_fn=MaskedCrossEntropy(fp32_upcast=False))
    if how == "replaced":
        assert replace_in(pp.parts, impl="torch") == ("0.model",)
    recipe = automodel_recipe.recipe(None, mesh, pp)
    (part,) = pp.parts
    optimizer = torch.optim.SGD(part.parameters(), lr=RATE)
    steps = []
    for inputs in batches:
        loss = automodel_recipe.step(recipe, inputs, labels=1)
        steps.append({n: p.grad.clone() for n, p in part.named_parameters() if p.grad is not None})
        if pp.info.has_last_stage:
            steps[-1]["loss"] = loss
        optimizer.step()
        optimizer.zero_grad()
    return steps


def contexts(rank: int) -> dict[str, list[dict[str, Tensor]]]:
    """By the class in place: gradients in full and the loss of both ranks, step by step."""
    del rank
    return {how: _train_with_contexts(how) for how in HOWS}


def _train_with_contexts(how: str) -> list[dict[str, Tensor]]:
    """Two context-parallel ranks: each embeds the whole sequence and keeps its part of it."""
    mesh = automodel_recipe.mesh(cp=2)
    model = made(how, **model_options())
    shard(model, mesh["cp"])
    # What its ``apply_cp`` does, for attention that is not Transformer Engine's.
    model.cp_mesh = mesh["cp"]
    for layer in model.model.language_model.layers.values():
        layer.self_attn.attn_func = functools.partial(attend_across, mesh["cp"])
    if how == "replaced":
        assert replace_in(model, impl="torch") == ("model",)
    recipe = automodel_recipe.recipe(model, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    steps = []
    for inputs in automodel_recipe.batches():
        with no_ring():
            loss = automodel_recipe.step(recipe, inputs, labels=1)
        torch.distributed.all_reduce(loss)
        steps.append({n: p.grad.full_tensor() for n, p in model.named_parameters()})
        steps[-1]["loss"] = loss
        optimizer.step()
        optimizer.zero_grad()
    return steps


@contextmanager
def no_ring() -> Iterator[None]:
    """torch's ``context_parallel`` shards its buffers and leaves attention alone.

    Its ring has no attention for the CPU. Automodel's own is Transformer Engine's.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("enable", "disable"):
            function = f"_{name}_context_parallel_dispatcher_impl"
            patch.setattr(_attention, function, lambda **_: None)
        yield


def attend_across(mesh: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """``[B, heads, S / 2, D]`` queries of this rank with the keys and values of both."""
    del options
    length = mesh.size() * query.shape[2]
    rows = [torch.arange(length).chunk(2 * mesh.size())[i] for i in range(2 * mesh.size())]
    places = [torch.cat([rows[r], rows[-1 - r]]) for r in range(mesh.size())]
    key, value = (
        all_gather_tensor_autograd(t.contiguous(), gather_dim=2, group=mesh) for t in (key, value)
    )
    visible = places[mesh.get_local_rank()][:, None] >= torch.cat(places)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


def of_recipe(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The same by one process with the stock class, the whole batch at once."""
    model = build(**model_options()).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    steps = []
    for inputs in automodel_recipe.batches():
        labels = inputs.pop("labels")
        logits = model(**filter_forward_kwargs(model, inputs))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        steps.append(grads | {"loss": loss.detach()})
        optimizer.step()
        optimizer.zero_grad()
    return steps
