"""Puts the fused embedding into Megatron-Bridge's ``Step37Model``.

:func:`patch_step37` does it for models built later, :func:`replace_in` for a model that exists.
Megatron is imported inside the functions that need it, not with this module.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from step37_kernels.image_insert_embedding import ImageInsertEmbedding
from step37_kernels.integration.options import InsertOptions
from step37_kernels.integration.parallel import sequence_layout
from step37_kernels.integration.patching import (
    AfterBuilding,
    ClassPatch,
    Mixin,
    chunks_of,
    is_fsdp_unit,
    refuse_own_methods,
    with_mixin,
)
from step37_kernels.integration.vocab_parallel import restore_dense_gradient, use_row_gradient

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from step37_kernels.integration.options import InsertKeywords

__all__ = ["patch_step37", "replace_in", "sequence_layout", "unpatch_step37"]

logger = logging.getLogger(__name__)

_PACKAGE = "megatron.bridge.models.stepfun.modelling_step37"
_CLASS = "ImageInsertEmbedding"
_PATCH = ClassPatch(
    caller="patch_step37",
    remedy="step37_kernels.megatron.replace_in(model)",
    # Step37Model looks the class up in the first module, which imports it from the second.
    modules=(f"{_PACKAGE}.model", f"{_PACKAGE}.image_insert_embedding"),
    name=_CLASS,
    distribution="megatron-bridge",
    known="Megatron-Bridge 0.6.2",
)


_PROJECTOR, _BORROWED = "align_projector", "_language_embedding"
"""The attributes by which a stock module is recognised."""

_TOWER = "Step37VisionModel"
_TOWER_PATCH = replace(_PATCH, modules=_PATCH.modules[:1], name=_TOWER, _stock={}, _put={})
_LAST_CONVOLUTION = "vit_downsampler2"


_options: InsertKeywords = {}
"""The options of the last call of :func:`patch_step37`, for models that are built later."""


class Step37ImageInsertEmbedding(ImageInsertEmbedding):
    """:class:`ImageInsertEmbedding` with the constructor of the stock class.

    Its options are those of the last call of :func:`patch_step37`.
    """

    def __init__(
        self,
        language_embedding: Any,
        encoder_output_dim: int,
        hidden_size: int,
        projector_bias: bool = False,
    ) -> None:
        super().__init__(
            language_embedding,
            encoder_output_dim,
            hidden_size,
            projector_bias,
            **_options,
        )

    def configure(self, **options: Unpack[InsertKeywords]) -> None:
        """Set all options, which are the fields of :class:`.InsertOptions`."""
        super().configure(**options)
        config = getattr(self._language_embedding, "config", None)
        if isinstance(self._language_embedding, nn.Module):
            _set_gradient_of_called(self._language_embedding, self.options)
        if self.layout == "auto" and getattr(config, "sequence_parallel", False):
            # Marked before the first forward: the groups may not exist yet, but a wrapper that
            # replaces parameters (Megatron's FSDP) copies their marks now.
            for parameter in self.align_projector.parameters():
                parameter.sequence_parallel = True  # type: ignore[attr-defined]


def _set_gradient_of_called(embedding: nn.Module, options: InsertOptions) -> None:
    """Choose how a language embedding that is called computes the gradient of its table.

    Row by row if gradients are fused, else as stock does.
    """
    fuses = options.fuses_gradients(getattr(embedding, "config", None))
    change = use_row_gradient if fuses else restore_dense_gradient
    change(embedding)


def _set_gradients_of_called(model: nn.Module, options: InsertOptions) -> None:
    """Do so for every language embedding in ``model``.

    The last pipeline stage has one that looks words up for multi-token prediction, and no
    ``ImageInsertEmbedding``.
    """
    for module in model.modules():
        if type(module).__name__ == "LanguageModelEmbedding":
            _set_gradient_of_called(module, options)


_MODEL_PATCH = replace(_PATCH, modules=_PATCH.modules[:1], name="Step37Model", _stock={}, _put={})
_MODELS = AfterBuilding(lambda model: _set_gradients_of_called(model, InsertOptions(**_options)))


class _ContiguousTower(Mixin):
    """Makes a subclass of ``Step37VisionModel`` return contiguous rows; its first base class."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _keep_channels_last(cast(nn.Module, self))


def _keep_channels_last(tower: nn.Module) -> None:
    """Let the last convolution see its input channels-last; so then is what it gives, and the rows
    that the tower makes of that by a view are contiguous."""
    if not keeps_channels_last(tower):
        convolution = tower.get_submodule(_LAST_CONVOLUTION)
        convolution.register_forward_pre_hook(_to_channels_last)


def is_tower(module: nn.Module) -> bool:
    """Whether this is Megatron-Bridge's vision tower, or derived from it."""
    return any(cls.__name__ == _TOWER for cls in type(module).__mro__)


def keeps_channels_last(tower: nn.Module) -> bool:
    """Whether the tower's last convolution sees its input channels-last."""
    convolution = tower._modules.get(_LAST_CONVOLUTION)
    return convolution is not None and (
        _to_channels_last in convolution._forward_pre_hooks.values()
    )


def _to_channels_last(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    image, *rest = arguments
    return (image.contiguous(memory_format=torch.channels_last), *rest)


def _contiguous(stock: type[nn.Module]) -> type[nn.Module]:
    return with_mixin(_ContiguousTower, stock)


def patch_step37(
    *, channels_last: bool = False, **options: Unpack[InsertKeywords]
) -> tuple[str, ...]:
    """Make every ``Step37Model`` built from now on use the fused embedding.

    Replaces ``ImageInsertEmbedding`` in ``…modelling_step37.model``, where ``Step37Model`` looks it
    up, and in ``…modelling_step37.image_insert_embedding``. Imports both, so that it does not
    matter whether the caller has. A second call replaces nothing; its options hold for models
    built after it. Where gradients are fused, word embeddings of these models that are called, on
    whatever pipeline stage, have their gradient by rows as well.

    The log says what is not replaced: models that exist already (a warning; see
    :func:`replace_in`); other modules that imported the class by name before (a warning names
    them); ``ImageForInsert``, which is interchangeable with ours; Bridge's data set, preprocessing
    and forward step (see ``step37_data``).

    Args:
        channels_last: make the vision tower return contiguous rows, which need no copy before the
            projection, by giving its last convolution a channels-last input. For this,
            ``Step37VisionModel`` is replaced in ``…modelling_step37.model``. Off by default,
            because cuDNN may choose another algorithm, which sums in another order and so rounds
            differently.
        **options: the fields of :class:`.InsertOptions`.

    Returns:
        The dotted names that hold our class now.

    Raises:
        ImportError: Megatron-Bridge, or a name in it, is missing. Nothing has been replaced then.
        ValueError: an option is none of the values that it may be.
    """
    global _options
    given = InsertOptions(**options)
    (model,) = _MODEL_PATCH.find().values()
    names = _PATCH.apply(lambda _: Step37ImageInsertEmbedding, ImageInsertEmbedding)
    _MODELS.apply(model)
    if channels_last:
        names += _TOWER_PATCH.apply(_contiguous, _ContiguousTower)
    else:
        _TOWER_PATCH.undo()
    _options = options
    logger.info(
        "patched: %s (%s). Not patched: Bridge's data set, preprocessing and forward step "
        "(step37_data.provider and step37_data.forward_step replace them), ImageForInsert "
        "(interchangeable with step37_kernels.ImageForInsert)%s",
        ", ".join(names),
        given,
        "" if channels_last else ", the vision tower",
    )
    return names


def unpatch_step37() -> tuple[str, ...]:
    """Undo :func:`patch_step37`; models built in between keep the fused embedding.

    They lose one thing: the row-by-row gradient of a ``VocabParallelEmbedding`` that is called.

    Returns:
        The dotted names that hold the stock class again; empty if nothing was patched.
    """
    global _options
    _options = {}
    _MODELS.undo()
    restore_dense_gradient()
    return _PATCH.undo() + _TOWER_PATCH.undo()


def replace_in(
    model: nn.Module | Sequence[nn.Module],
    *,
    channels_last: bool = False,
    **options: Unpack[InsertKeywords],
) -> tuple[str, ...]:
    """Make an existing model use the fused embedding, also if DDP, FSDP or Float16Module wraps it.

    The stock module stays the same object and only changes its class, as under ``fully_shard``. So
    its ``Parameter`` objects, the borrowed embedding, hooks, and references that a wrapper or an
    optimizer keeps to parameters or modules stay valid. If its projector has been wrapped or
    replaced before (LoRA, ``modules_to_save``, a layer of Transformer Engine), it is called.

    Args:
        model: the model, or Megatron's list of model chunks.
        channels_last: see :func:`patch_step37`.
        **options: the fields of :class:`.InsertOptions`.

    Returns:
        Names of the modules that have the fused embedding now, as in ``named_modules`` of the
        model; for a list of models the index comes before the name. Empty on later pipeline
        stages, which have no such module.

    Raises:
        TypeError: the model is neither a module nor a sequence of them.
        ValueError: an option is none of the values that it may be, the module is an FSDP unit of
            its own, or its instance has a ``forward`` of its own.
    """
    given = InsertOptions(**options)
    chunks = chunks_of(model)
    ours: dict[str, nn.Module] = {}
    others: list[str] = []
    for prefix, chunk in chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, ImageInsertEmbedding) or is_stock(module):
                ours[f"{prefix}{name}"] = module
            elif is_named_so(module):
                others.append(description_of(f"{prefix}{name}", module))
    for name, module in ours.items():
        if isinstance(module, ImageInsertEmbedding):
            continue
        if is_fsdp_unit(module):
            raise ValueError(
                f"{name} is an FSDP unit of its own, whose class cannot be changed any more: call "
                "patch_step37() before the model is built, or leave it to the enclosing unit"
            )
        refuse_own_methods(name, module, ("forward",))
    for module in ours.values():
        if not isinstance(module, ImageInsertEmbedding):
            module.__class__ = Step37ImageInsertEmbedding
        cast(ImageInsertEmbedding, module).configure(**options)
    for _, chunk in chunks:
        _set_gradients_of_called(chunk, given)
    if channels_last:
        for _, chunk in chunks:
            for module in chunk.modules():
                if is_tower(module):
                    _keep_channels_last(module)
    if others:
        logger.warning(
            "replace_in leaves modules named ImageInsertEmbedding that are not of its shape (a "
            "module align_projector, and _language_embedding): %s",
            "; ".join(others),
        )
    if ours:
        logger.info("fused embedding in %s (%s)", ", ".join(ours), given)
    elif any(getattr(m, "pre_process", None) is False for _, c in chunks for m in c.modules()):
        logger.info("no ImageInsertEmbedding: not the first pipeline stage")
    elif not others:
        logger.warning(
            "replace_in found no ImageInsertEmbedding in %s: nothing is replaced",
            ", ".join(type(chunk).__name__ for _, chunk in chunks),
        )
    return tuple(ours)


def is_stock(module: nn.Module) -> bool:
    """Whether this is a stock ``ImageInsertEmbedding``, of whatever version, or derived from it.

    Its projector may be any module, such as an adapter (LoRA, ``modules_to_save``), a quantised
    layer or a layer of Transformer Engine. It is called, as the stock module calls it.
    """
    projector = module._modules.get(_PROJECTOR)
    return is_named_so(module) and projector is not None and _BORROWED in vars(module)


def is_named_so(module: nn.Module) -> bool:
    return any(cls.__name__ == _CLASS for cls in type(module).__mro__)


def description_of(name: str, module: nn.Module) -> str:
    """Of a module of the stock name that is not of the stock shape: what it has and lacks."""
    kind = type(module)
    projector = getattr(module, _PROJECTOR, None)
    if projector is None:
        has = f"no {_PROJECTOR}"
    elif isinstance(projector, nn.Module):
        has = f"{_PROJECTOR} of class {type(projector).__name__}"
    else:
        has = f"{_PROJECTOR} of class {type(projector).__name__}, which is no module"
    if _BORROWED not in vars(module):
        has += f", no {_BORROWED}"
    return f"{name or 'the model itself'} ({kind.__module__}.{kind.__qualname__}: {has})"
