"""Makes NeMo Automodel's Step-3.7 (``Step3p7Model``) project and merge images in one pass.

:func:`patch_step3p7` does it for models built later, :func:`replace_in` for a model that exists.
Automodel is imported inside the functions that need it, not with this module.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from step37_kernels.dispatch import Impl, check_impl
from step37_kernels.insert import insert_rows, join_rows, project_and_insert
from step37_kernels.integration.patching import (
    ClassPatch,
    Mixin,
    chunks_of,
    is_fsdp_unit,
    refuse_own_methods,
    with_mixin,
)
from step37_kernels.integration.projector import (
    allow_called,
    plain_projector,
    refuse_called,
    run_forward_pre_hooks,
    tensors_of,
)
from step37_kernels.integration.ways import (
    ROWS,
    Place,
    Way,
    Ways,
    way_of,
    way_of_launch,
    way_of_product,
)
from step37_kernels.plan import InsertPlan, plan_runs
from step37_kernels.ranges import profiled

__all__ = ["patch_step3p7", "replace_in", "unpatch_step3p7"]

logger = logging.getLogger(__name__)

_CLASS = "Step3p7Model"
REPLACED_METHODS = ("get_multimodal_embeddings", "prepare_inputs_embeds")
_PATCH = ClassPatch(
    caller="patch_step3p7",
    remedy="step37_kernels.automodel.replace_in(model)",
    modules=("nemo_automodel.components.models.step3p7.model",),
    name=_CLASS,
    distribution="nemo-automodel",
    known="NeMo Automodel 0.7.0",
    methods=(
        ("get_multimodal_embeddings",),
        ("prepare_inputs_embeds",),
        ("_vision_dtype_device",),
        # Give the tower's rows before projection; the first that the model has is used.
        ("_downsample_image_features", "_process_image_features"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    impl: Impl = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        check_impl(self.impl)


_options = _Options()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Features(Sequence[Tensor]):
    """The rows of all images between vision tower and merge, not projected yet.

    The merge reads the tensors below. Anybody else who indexes the sequence or iterates over it
    gets what stock returns: ``[R, H]`` of each image, the rows of its crops before its own. That
    projects all images by one call, and fetches the numbers of crops from the device.
    """

    projector: nn.Module
    tensors: list[Tensor]
    """``[N, L, C]`` each: the crops, if there are any, then the images."""
    place: Tensor | None = None
    """``[R]`` int64: the index of each row of the tensors in the model's order; None: the same."""
    counts: Tensor | None = None
    """``[N]`` int64: the number of crops of each image; None if there are no crops."""

    def __len__(self) -> int:
        return len(self.tensors[-1])

    def __getitem__(self, index: Any) -> Any:
        return self._projected[index]

    @cached_property
    def _projected(self) -> list[Tensor]:
        rows: Tensor = self.projector(join_rows(self.tensors))
        images = self.tensors[-1]
        sizes = [images.shape[1]] * len(images)
        if self.place is not None and self.counts is not None:
            crops = self.tensors[0]
            rows = torch.empty_like(rows).index_copy(0, self.place, rows)
            starts = [0, *ends_of_crops(self.counts, crops).tolist()]
            sizes = [
                (end - start) * crops.shape[1] + images.shape[1]
                for start, end in itertools.pairwise(starts)
            ]
        return list(rows[: sum(sizes)].split(sizes))


class FusedMerge(Mixin):
    """Makes a subclass of ``Step3p7Model`` project and merge in one pass; its first base class.

    ``prepare_inputs_embeds`` takes what ``get_multimodal_embeddings`` returns, as in stock: a
    sequence of one tensor an image. The merge reads the rows behind it and projects them itself;
    only code that indexes the sequence gets projected tensors.
    """

    config: Any
    language_model: Any
    vision_model: Any
    vit_large_projector: Any
    step37_options: _Options
    step37_told: list[bool]
    """Holds something once the log says which way each part takes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.step37_options = _options
        self.step37_told = []

    def get_multimodal_embeddings(
        self,
        *,
        pixel_values: Tensor | None = None,
        patch_pixel_values: Tensor | None = None,
        num_patches: Tensor | Sequence[int] | None = None,
        image_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode images ``[N, 3, s, s]`` and crops ``[P, 3, t, t]``; the host does not wait.

        Returns:
            A sequence of the rows ``[R, H]`` of each image, the rows of its crops before its own.
            The merge projects them. Indexing the sequence or iterating over it projects them too,
            and waits for the device. ``image_embeds`` are returned as ``[R, H]``; without images
            the result is None.

        Raises:
            ValueError: ``num_patches`` has another length than there are images, or asks for crops
                where there are none.
        """
        if image_embeds is not None or pixel_values is None or self.vision_model is None:
            return super().get_multimodal_embeddings(  # type: ignore[misc]
                pixel_values=pixel_values,
                patch_pixel_values=patch_pixel_values,
                num_patches=num_patches,
                image_embeds=image_embeds,
                **kwargs,
            )
        crops = None
        if num_patches is not None and patch_pixel_values is not None:
            crops = self._encode(patch_pixel_values) if patch_pixel_values.numel() else None
        images = self._encode(pixel_values)
        if num_patches is None:
            return _Features(projector=self.vit_large_projector, tensors=[images])
        counts = torch.as_tensor(num_patches).flatten()
        if len(counts) != len(images):
            raise ValueError(
                f"num_patches: expected one of each of the {len(images)} images, got {len(counts)}"
            )
        if crops is None:
            if counts.device.type == "cpu" and counts.any():
                raise ValueError(
                    f"num_patches: asks for {int(counts.sum())} crops, but patch_pixel_values is "
                    "missing"
                )
            return _Features(projector=self.vit_large_projector, tensors=[images])
        counts = counts.to(images.device, torch.int64, non_blocking=True)
        return _Features(
            projector=self.vit_large_projector,
            tensors=[crops, images],
            place=places_of_rows(counts, crops, images),
            counts=counts,
        )

    def prepare_inputs_embeds(self, input_ids: Tensor, multimodal_embeddings: Any = None) -> Tensor:
        """Word embeddings, with the image rows at the positions of ``image_token_id``.

        Args:
            input_ids: ``[B, S]``, or ``[T]`` of packed sequences.
            multimodal_embeddings: from :meth:`get_multimodal_embeddings`, or rows that are
                projected already: ``[R, H]``, or a sequence of such tensors.

        Returns:
            ``[B, S, H]``, or ``[T, H]``.

        Raises:
            ValueError: with ``strict``, rows and placeholders differ in number.
        """
        if multimodal_embeddings is None or self.language_model.embed_tokens is None:
            return super().prepare_inputs_embeds(input_ids)  # type: ignore[misc]
        words = self.language_model.embed_tokens(input_ids)
        input_ids = torch.atleast_2d(input_ids)
        embeddings = words.view(*input_ids.shape, words.shape[-1])
        if isinstance(multimodal_embeddings, _Features):
            tensors, place = multimodal_embeddings.tensors, multimodal_embeddings.place
        else:
            projected = multimodal_embeddings
            tensors = list(projected) if isinstance(projected, (list, tuple)) else [projected]
            place = None
        num_rows = sum(math.prod(tensor.shape[:-1]) for tensor in tensors)
        self._tell_ways(num_rows)
        plan = self._plan(input_ids, num_rows)
        if place is not None:
            plan = with_rows_moved(plan, place)
        if isinstance(multimodal_embeddings, _Features):
            merged = self._project_and_insert(embeddings, tensors, plan)
        else:
            with profiled("insert"):
                rows = torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])
                merged = insert_rows(embeddings, rows.to(embeddings), plan)
        return merged.view(words.shape)

    def _tell_ways(self, rows: int) -> None:
        """Log at the first merge, in one line, which way each part takes."""
        # In this order: torch.compile looks no further, and so does not trace again for the list.
        if torch.compiler.is_compiling() or self.step37_told:
            return
        self.step37_told.append(True)
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s: %s", type(self).__name__, self._step37_ways(rows=rows or ROWS))

    def _step37_ways(self, *, rows: int = ROWS) -> Ways:
        """Which way each part of the merge takes, asked of what decides in the merge itself."""
        words, projector = self.language_model.embed_tokens, self.vit_large_projector
        at = Place.of(words)
        device, dtype = at.device or torch.device("cpu"), at.dtype or torch.float32
        impl = self.step37_options.impl
        why_called, is_unit = _why_called(projector, dtype)

        def projection() -> Way:
            if why_called is not None:
                refuse_called(projector, "vit_large_projector", impl, device)
                return Way("called", why_called)
            way = way_of_product(projector.weight, impl, rows)
            within = f"{way.why}, within the call that FSDP's hooks need"
            return Way(way.how, within) if is_unit else way

        def projector_gradient() -> Way:
            if not any(tensor.requires_grad for tensor in tensors_of(projector)):
                return Way("none", "it is frozen")
            return Way("autograd", "Automodel's optimizers read .grad")

        def words_gradient() -> Way:
            if any(tensor.requires_grad for tensor in tensors_of(words)):
                return Way("autograd", "embed_tokens is called")
            return Way("none", "it is frozen")

        return Ways(
            words=Way("called", "the merge takes what embed_tokens gives"),
            plan=way_of(lambda: way_of_launch(impl, device)),
            projection=way_of(projection),
            projector_gradient=projector_gradient(),
            words_gradient=words_gradient(),
            layout=Way("whole"),
            text_only_gradient=Way("none", "as in stock"),
            words_place=at,
            projector_place=Place.of(projector),
        )

    def _encode(self, pixels: Tensor) -> Tensor:
        """The rows ``[N, L, C]`` of pictures before projection, a channels-first view."""
        dtype, device = self._vision_dtype_device()  # type: ignore[attr-defined]
        pixels = pixels.reshape(-1, *pixels.shape[-3:]).to(device=device, dtype=dtype)
        patches = self.vision_model(pixels)
        features: Tensor
        if hasattr(self, "_downsample_image_features"):
            features = self._downsample_image_features(patches)
        else:
            # Stock's own function, with a projector that returns its input.
            tower = SimpleNamespace(
                vision_model=self.vision_model, vit_large_projector=lambda rows: rows
            )
            features = super()._process_image_features.__func__(tower, patches)  # type: ignore[misc]
        return features

    def _plan(self, input_ids: Tensor, num_rows: int) -> InsertPlan:
        """Plan one row for each placeholder, and warn if their numbers differ."""
        options = self.step37_options
        plan = plan_runs(
            input_ids,
            ((self.config.image_token_id, ((num_rows, 1),)),),
            shift=0,
            batch_first=True,
            impl=options.impl,
            # Under torch.compile the counts are checked inside the plan's operator; a separate
            # copy would be removed as dead code.
            watch=not options.strict,
        )
        if options.strict:
            placeholders = plan.start_counts.item()
            if placeholders != plan.num_rows:
                raise ValueError(
                    f"input_ids: {placeholders} placeholders (token "
                    f"{self.config.image_token_id}) for {plan.num_rows} rows of image features"
                )
        return plan

    def _project_and_insert(
        self, embeddings: Tensor, features: list[Tensor], plan: InsertPlan
    ) -> Tensor:
        projector = self.vit_large_projector
        impl = self.step37_options.impl

        def fused(*tensors: Tensor) -> Tensor:
            weight, bias = projector.weight, projector.bias
            return project_and_insert(embeddings, tensors, weight, bias, plan, impl=impl)

        why_called, is_unit = _why_called(projector, embeddings.dtype)
        if why_called is None and not is_unit:
            run_forward_pre_hooks(projector)
            return fused(*features)
        if why_called is None:
            # FSDP gathers the weight before a forward and sees to its gradient after it, by hooks
            # of the call: so the call is made, of another forward.
            projector.forward = fused
            try:
                output: Tensor = projector(*features)
            finally:
                del projector.forward
            return output
        allow_called(projector, "vit_large_projector", impl, embeddings.device)
        with profiled("insert"):
            rows = projector(join_rows(features))
            return insert_rows(embeddings, rows.to(embeddings.dtype), plan)


def _why_called(projector: nn.Module, dtype: torch.dtype) -> tuple[str | None, bool]:
    """Why the projector is called, None where its weight and bias stand for it; and whether these
    are read within a call of it, for FSDP's sake."""
    plain = plain_projector(projector)
    if not isinstance(plain, str):
        return None, False
    if _is_plain_unit_of_fsdp(projector, dtype):
        return None, True
    return plain, False


def ends_of_crops(counts: Tensor, crops: Tensor) -> Tensor:
    """``[N]`` int64: one past the last crop of each image, at most the number of crops."""
    return counts.cumsum(0).clamp_max(len(crops))


def places_of_rows(counts: Tensor, crops: Tensor, images: Tensor) -> Tensor:
    """The new index of each row if the crops of every image are moved before it: ``[R]`` int64.

    Crops that belong to no image come last, after all images.

    Args:
        counts: ``[N]`` int64, the number of crops of each image.
        crops: ``[P, L, C]``.
        images: ``[N, M, C]``.
    """
    crop_rows, image_rows = crops.shape[1], images.shape[1]
    ends = ends_of_crops(counts, crops)

    def rows_of(firsts: Tensor, rows: int) -> Tensor:
        return (firsts[:, None] + torch.arange(rows, device=firsts.device)).flatten()

    crop = torch.arange(len(crops), device=counts.device)
    image = torch.arange(len(images), device=counts.device)
    images_before = torch.searchsorted(ends, crop, right=True)
    return torch.cat(
        [
            rows_of(crop * crop_rows + images_before * image_rows, crop_rows),
            rows_of(ends * crop_rows + image * image_rows, image_rows),
        ]
    )


def with_rows_moved(plan: InsertPlan, place: Tensor) -> InsertPlan:
    """The same plan for rows in another order: row r is the given plan's row ``place[r]``."""
    row_of = torch.empty_like(place).scatter_(
        0, place, torch.arange(len(place), device=place.device)
    )
    row_at = plan.row_at.long()
    moved = torch.where(row_at < 0, row_at, row_of[row_at.clamp_min(0)]) if len(place) else row_at
    return replace(
        plan,
        destinations=plan.destinations[place],
        starts=plan.starts[place],
        row_at=moved.to(torch.int32),
    )


def _is_plain_unit_of_fsdp(projector: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the projector is an ``nn.Linear`` that FSDP shards by itself, and nothing more.

    Sharded by PyTorch's ``fully_shard`` or by Megatron-FSDP: see :func:`.is_fsdp_unit`.
    """
    from torch.distributed.fsdp import FSDPModule

    if not (is_fsdp_unit(projector) and type(projector).forward is nn.Linear.forward):
        return False
    hooks = (
        *projector._forward_pre_hooks.values(),
        *projector._forward_hooks.values(),
        *projector._backward_hooks.values(),
        *projector._backward_pre_hooks.values(),
    )
    if not all(_is_of_fsdp(hook) for hook in hooks):
        return False
    if isinstance(projector, FSDPModule):
        return projector._get_fsdp_state()._mp_policy.output_dtype in (None, dtype)
    return True


def _is_of_fsdp(hook: Any) -> bool:
    module = f"{getattr(hook, '__module__', '')}."
    return module.startswith("torch.distributed.") or ".megatron_fsdp." in f".{module}"


def is_named_so(module: nn.Module) -> bool:
    """Whether this is Automodel's ``Step3p7Model``, or derived from it: ours is, too."""
    return any(cls.__name__ == _CLASS for cls in type(module).__mro__)


def _fused(stock: type[nn.Module]) -> type[nn.Module]:
    return with_mixin(FusedMerge, stock)


def patch_step3p7(*, impl: Impl = "auto", strict: bool = False) -> tuple[str, ...]:
    """Make every Step-3.7 model of Automodel built from now on project and merge in one pass.

    Replaces ``Step3p7Model`` in ``nemo_automodel.components.models.step3p7.model``, where
    ``Step3p7ForConditionalGeneration`` looks it up; parameters and state dict stay. A second call
    replaces nothing; its options hold for models built after it. Not replaced: models that exist
    already (a warning; see :func:`replace_in`), the vision tower, the language model, the data.

    Args:
        impl: ``"auto"`` (Triton for CUDA tensors, PyTorch otherwise), ``"triton"`` or ``"torch"``.
        strict: raise ``ValueError`` at once if rows and placeholders differ in number, as stock
            does; that waits for the device in every forward. Otherwise they are paired up to the
            smaller number and a warning is logged, on CUDA by a later forward.

    Returns:
        The dotted names that hold our class now.

    Raises:
        ImportError: Automodel, a name in it, or a method that our class needs is missing. Nothing
            has been replaced then.
        ValueError: ``impl`` is none of the three.
    """
    global _options
    options = _Options(impl=impl, strict=strict)
    names = _PATCH.apply(_fused, FusedMerge)
    _options = options
    logger.info("patched: %s (%s)", ", ".join(names), options)
    return names


def unpatch_step3p7() -> tuple[str, ...]:
    """Undo :func:`patch_step3p7`; models built in between keep the fused merge.

    Returns:
        The dotted names that hold the stock class again; empty if nothing was patched.
    """
    global _options
    _options = _Options()
    return _PATCH.undo()


def replace_in(
    model: nn.Module | Sequence[nn.Module], *, impl: Impl = "auto", strict: bool = False
) -> tuple[str, ...]:
    """Make an existing Step-3.7 model of Automodel project and merge in one pass, sharded or not.

    The module stays the same object and only changes its class, as under ``fully_shard``. So its
    parameters, its hooks, and references to it stay valid.

    Args:
        model: the model, or the parts of a pipeline.
        impl, strict: see :func:`patch_step3p7`.

    Returns:
        Names of the modules that are fused now, as in ``named_modules`` of the model; for a list
        of models the index comes before the name.

    Raises:
        TypeError: the model is neither a module nor a sequence of them.
        ValueError: ``impl`` is none of the three, an instance has its own version of a method that
            our class replaces, or its class lacks a method that ours needs. (An instance may have
            its own ``forward``, since ours does not replace that method.)
    """
    options = _Options(impl=impl, strict=strict)
    found: dict[str, Any] = {
        f"{prefix}{name}": module
        for prefix, chunk in chunks_of(model)
        for name, module in chunk.named_modules()
        if is_named_so(module)
    }
    for name, module in found.items():
        if not isinstance(module, FusedMerge):
            _PATCH.refuse_without_methods(name, module)
            refuse_own_methods(name, module, REPLACED_METHODS)
    for module in found.values():
        if not isinstance(module, FusedMerge):
            module.__class__ = _fused(type(module))
        module.step37_options = options
        module.step37_told = []
    if found:
        logger.info("fused merge in %s (%s)", ", ".join(found), options)
    else:
        logger.warning("replace_in found no %s: nothing is replaced", _CLASS)
    return tuple(found)
