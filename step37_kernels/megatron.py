"""The drop-in inside Megatron-Bridge's ``Step37Model``: for models to come, and for built ones.

Megatron is imported inside the functions that need it, so that importing this module does not.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from step37_kernels.dispatch import Impl, check_impl
from step37_kernels.image_insert_embedding import ImageInsertEmbedding
from step37_kernels.parallel import Layout, check_layout, sequence_layout

__all__ = ["patch_step37", "replace_in", "sequence_layout", "unpatch_step37"]

logger = logging.getLogger(__name__)

KNOWN_BRIDGE_VERSIONS = "Megatron-Bridge 0.6.2"
"""Releases in which the replaced class was found where this module looks for it."""

_PACKAGE = "megatron.bridge.models.stepfun.modelling_step37"
# Step37Model looks the class up in the first, which took it from the second by name.
_MODULES = (f"{_PACKAGE}.model", f"{_PACKAGE}.image_insert_embedding")
_CLASS = "ImageInsertEmbedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What a patched class passes on to :class:`ImageInsertEmbedding`."""

    impl: Impl = "auto"
    strict: bool = False
    text_only_gradient: bool = True
    gradient_accumulation_fusion: bool = False
    layout: Layout = "auto"

    def arguments(self) -> dict[str, Any]:
        """For the constructor and :meth:`ImageInsertEmbedding.configure`."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __post_init__(self) -> None:
        check_impl(self.impl)
        check_layout(self.layout)


_options = _Options()
_stock: dict[str, type[nn.Module]] = {}
# The replaced class by module name; empty while nothing is patched.


class Step37ImageInsertEmbedding(ImageInsertEmbedding):
    """:class:`ImageInsertEmbedding` with the stock constructor.

    Its options are those of the last :func:`patch_step37`.
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
            **_options.arguments(),
        )

    @staticmethod
    def _normalize_feature_list(
        image_features: Tensor | list[Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        """One tensor ``[L, C]`` a feature. Models built before the patch keep the stock class,
        whose code looks this up by the class's name: here, now."""
        tensors = [image_features] if isinstance(image_features, Tensor) else image_features
        ranks = {t.ndim for t in tensors}
        if ranks - ({3} if isinstance(image_features, Tensor) else {2, 3}):
            raise ValueError(
                "image_features: expected [N, L, C], or a list of [L, C] and [N, L, C], got "
                f"{[tuple(t.shape) for t in tensors]}"
            )
        features = (f for t in tensors for f in (t if t.ndim == 3 else [t]))
        return [feature.to(device=device, dtype=dtype) for feature in features]

    def configure(self, **options: Any) -> None:
        """Set all options, which are those of the constructor of :class:`ImageInsertEmbedding`."""
        super().configure(**options)
        config = getattr(self._language_embedding, "config", None)
        if self.layout == "auto" and getattr(config, "sequence_parallel", False):
            # The groups may not exist yet, and a wrapper that replaces parameters (Megatron's FSDP)
            # copies their marks before the first forward sets this one.
            for parameter in self.align_projector.parameters():
                parameter.sequence_parallel = True  # type: ignore[attr-defined]


def patch_step37(
    *,
    impl: Impl = "auto",
    strict: bool = False,
    text_only_gradient: bool = True,
    gradient_accumulation_fusion: bool = False,
    layout: Layout = "auto",
) -> tuple[str, ...]:
    """Let every ``Step37Model`` built from now on use the fused embedding.

    Replaces ``ImageInsertEmbedding`` in ``…modelling_step37.model``, where ``Step37Model`` looks it
    up, and in ``…modelling_step37.image_insert_embedding``. Imports both, so that it does not
    matter whether the caller has. A second call replaces nothing; its options hold for models
    built after it.

    Not replaced, and said so in the log: models that exist already (a warning; see
    :func:`replace_in`); other modules that took the class by name before (named in a warning);
    ``ImageForInsert``, which is interchangeable with ours; Bridge's data set, preprocessing and
    forward step (see ``step37_data``).

    Args:
        impl, strict, text_only_gradient, gradient_accumulation_fusion: see
            :class:`ImageInsertEmbedding`. ``text_only_gradient`` is on here, because Megatron
            reduces gradients while backward runs.
        layout: ``"auto"`` (see :func:`step37_kernels.parallel.auto_layout`): under sequence
            parallelism each rank embeds its own ``[S / TP, B, H]``, without it the whole. Context
            parallelism is an error in the first forward then: it needs a layout from
            :func:`sequence_layout`. None: the whole sequence on every rank, as the stock class has
            it.

    Returns:
        The dotted names that hold our class now.

    Raises:
        ImportError: Megatron-Bridge, or a name in it, is missing. Nothing has been replaced then.
        ValueError: ``impl`` is none of the three, or ``layout`` another word.
    """
    global _options
    options = _Options(
        impl=impl,
        strict=strict,
        text_only_gradient=text_only_gradient,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        layout=layout,
    )
    modules = {name: _import(name) for name in _MODULES}
    found = {name: _look_up(module) for name, module in modules.items()}
    _options = options
    replaced = {
        name: cls for name, cls in found.items() if not issubclass(cls, ImageInsertEmbedding)
    }
    if replaced:
        _warn_of_what_stays(set(replaced.values()))
    for name, cls in replaced.items():
        _stock[name] = cls
        setattr(modules[name], _CLASS, Step37ImageInsertEmbedding)
    names = tuple(f"{name}.{_CLASS}" for name in _MODULES)
    logger.info(
        "%s: %s (%s). Not patched: Bridge's data set, preprocessing and forward step "
        "(step37_data.provider and step37_data.forward_step replace them), ImageForInsert "
        "(interchangeable with step37_kernels.ImageForInsert), the vision tower",
        "patched" if replaced else "already patched",
        ", ".join(names),
        options,
    )
    return names


def unpatch_step37() -> tuple[str, ...]:
    """Undo :func:`patch_step37`; models built in between keep the fused embedding.

    Returns:
        The dotted names that hold the stock class again; empty if nothing was patched.
    """
    global _options
    restored = []
    for name, cls in _stock.items():
        module = sys.modules.get(name)
        current = getattr(module, _CLASS, None)
        if current is Step37ImageInsertEmbedding:
            setattr(module, _CLASS, cls)
            restored.append(f"{name}.{_CLASS}")
        else:
            logger.warning(
                "%s.%s is %r, not what patch_step37 put there: left alone", name, _CLASS, current
            )
    _stock.clear()
    _options = _Options()
    if restored:
        logger.info("unpatched: %s", ", ".join(restored))
    return tuple(restored)


def replace_in(
    model: nn.Module | Sequence[nn.Module],
    *,
    impl: Impl = "auto",
    strict: bool = False,
    text_only_gradient: bool = True,
    gradient_accumulation_fusion: bool = False,
    layout: Layout = "auto",
) -> tuple[str, ...]:
    """Let a built model use the fused embedding, whatever wraps it (DDP, FSDP, Float16Module).

    The stock module stays the object it is and changes its class, as ``fully_shard`` does it: its
    ``Parameter`` objects, the borrowed embedding, hooks, and whatever a wrapper or an optimizer
    keeps by parameter or by module stay valid.

    Args:
        model: the model, or Megatron's list of model chunks.
        impl, strict, text_only_gradient, gradient_accumulation_fusion, layout: see
            :func:`patch_step37`.

    Returns:
        Names of the modules that have the fused embedding now, by ``named_modules`` of the model
        (of a list: preceded by the index). Empty, rightly, on later pipeline stages.

    Raises:
        ValueError: ``impl`` is none of the three, ``layout`` another word, or the module is an FSDP
            unit of its own.
    """
    from torch.distributed.fsdp import FSDPModule

    options = _Options(
        impl=impl,
        strict=strict,
        text_only_gradient=text_only_gradient,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        layout=layout,
    )
    chunks = [("", model)] if isinstance(model, nn.Module) else _numbered(model)
    ours: dict[str, nn.Module] = {}
    for prefix, chunk in chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, ImageInsertEmbedding) or _is_stock(module):
                ours[f"{prefix}{name}"] = module
    for name, module in ours.items():
        if isinstance(module, FSDPModule) and not isinstance(module, ImageInsertEmbedding):
            raise ValueError(
                f"{name} is an FSDP unit of its own, whose class cannot be changed any more: call "
                "patch_step37() before the model is built, or leave it to the enclosing unit"
            )
    for module in ours.values():
        if not isinstance(module, ImageInsertEmbedding):
            module.__class__ = Step37ImageInsertEmbedding
        cast(ImageInsertEmbedding, module).configure(**options.arguments())
    if ours:
        logger.info("fused embedding in %s (%s)", ", ".join(ours), options)
    elif any(getattr(m, "pre_process", None) is False for _, c in chunks for m in c.modules()):
        logger.info("no ImageInsertEmbedding: not the first pipeline stage")
    else:
        logger.warning(
            "replace_in found no ImageInsertEmbedding in %s: nothing is replaced",
            ", ".join(type(chunk).__name__ for _, chunk in chunks),
        )
    return tuple(ours)


def _numbered(chunks: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
    return [(f"{i}.", chunk) for i, chunk in enumerate(chunks)]


def _is_stock(module: nn.Module) -> bool:
    """Whether this is a stock ``ImageInsertEmbedding``, of whatever version, or derived from it."""
    named_so = any(cls.__name__ == _CLASS for cls in type(module).__mro__)
    projector = module._modules.get("align_projector")
    return named_so and isinstance(projector, nn.Linear) and "_language_embedding" in vars(module)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if not f"{name}.".startswith(f"{missing}."):
            # Bridge is there, and lacks something itself: that is the better message.
            raise
        raise ImportError(_missing(f"module {name}", f"no module {missing}"), name=name) from error


def _look_up(module: ModuleType) -> type[nn.Module]:
    cls = getattr(module, _CLASS, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        found = "no such name" if cls is None else f"found {cls!r}"
        raise ImportError(_missing(f"{module.__name__}.{_CLASS}", found), name=module.__name__)
    return cls


def _missing(what: str, found: str) -> str:
    try:
        installed = f"megatron-bridge {importlib.metadata.version('megatron-bridge')}"
    except importlib.metadata.PackageNotFoundError:
        installed = "no megatron-bridge distribution"
    return (
        f"patch_step37: cannot replace {what}: {found}. "
        f"Known to work: {KNOWN_BRIDGE_VERSIONS}; installed: {installed}"
    )


def _warn_of_what_stays(stock: set[type[nn.Module]]) -> None:
    built = sum(1 for _ in _instances(stock))
    if built:
        logger.warning(
            "patch_step37 after %d stock ImageInsertEmbedding had been built: existing models keep "
            "it; call step37_kernels.megatron.replace_in(model) on them",
            built,
        )
    bound = sorted(
        name
        for name, module in tuple(sys.modules.items())
        if name not in _MODULES
        and any(getattr(module, "__dict__", {}).get(_CLASS) is cls for cls in stock)
    )
    if bound:
        logger.warning(
            "patch_step37 leaves the stock class in modules that imported it by name before: %s",
            ", ".join(bound),
        )


def _instances(classes: set[type[nn.Module]]) -> Iterator[object]:
    bases = tuple(classes)
    for candidate in gc.get_objects():
        # type(), not isinstance: that asks proxies for their __class__, which may run anything.
        if issubclass(type(candidate), bases):
            yield candidate
