"""Says of a model what is replaced in it, and which way each part takes: :func:`report`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from step37_kernels import automodel, megatron
from step37_kernels.image_insert_embedding import ImageInsertEmbedding
from step37_kernels.integration.patching import chunks_of, is_fsdp_unit, origin_of
from step37_kernels.integration.vocab_parallel import RowGradient, why_dense
from step37_kernels.integration.ways import ROWS, Ways

State = Literal["ours", "stock", "own forward"]

_LABEL_WIDTH = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """What :func:`step37_kernels.report` says of one module.

    Attributes:
        name: by ``named_modules`` of the model; of a list of models preceded by the index.
        cls: dotted name of the class that does the work: ours where it is in place.
        stock: name of the framework's class that ours takes the place of.
        state: ``"ours"``; ``"stock"``: the framework's class is still there; or ``"own forward"``:
            ours is there, but the instance or a class derived from ours has a method of its own,
            which runs in its place.
        why: what else there is to say, such as what replaces a stock module. Or empty.
        ways: which way each part takes: each has ``how`` and ``why``
            (``.ways.projection.how == "Triton"``). None where ours does not embed.
    """

    name: str
    cls: str
    stock: str
    state: State
    why: str = ""
    ways: Ways | None = None

    def __str__(self) -> str:
        titles: dict[State, str] = {
            "ours": f"ours, in place of {self.stock}",
            "stock": f"NOT ours: {self.stock}",
            "own forward": f"ours, in place of {self.stock}, but NOT in effect",
        }
        lines = {} if self.state == "stock" else {"class": self.cls}
        if self.why:
            lines["note"] = self.why
        if self.ways is not None:
            lines |= self.ways.items()
        rows = [f"  {name:{_LABEL_WIDTH}}{text}" for name, text in lines.items()]
        return "\n".join([f"{self.name or 'the model itself'}: {titles[self.state]}", *rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is replaced in a model, and what is not; printed, a table.

    Attributes:
        modules: of each module that is replaced, or could be, in the model's order.
        why: where there is none: why not.
    """

    modules: tuple[ModuleReport, ...]
    why: str = ""

    @property
    def active(self) -> bool:
        """Whether all embeddings of pictures in the model are ours, of which there is one at
        least, and nothing runs in place of ours."""
        embedding = [m for m in self.modules if m.stock in (_EMBEDDING, _MERGE)]
        return bool(embedding) and all(module.state == "ours" for module in embedding)

    def __str__(self) -> str:
        return "\n".join(map(str, self.modules)) or self.why


_EMBEDDING, _MERGE, _TABLE, _TOWER = (
    "ImageInsertEmbedding",
    "Step3p7Model",
    "VocabParallelEmbedding",
    "Step37VisionModel",
)


def report(model: nn.Module | Sequence[nn.Module], *, rows: int = ROWS) -> Report:
    """Say which parts of a model are ours, which way each takes and why, and what is not replaced.

    Nothing runs, and no value is read: what decides in a forward is asked. ``print(report(model))``
    shows a table; the fields are there for a test. What FSDP2 has sharded is described as it is in
    a forward, gathered.

    Args:
        model: any model, in whatever wraps it (DDP, FSDP, ``Float16Module``, ``torch.compile``), or
            Megatron's list of model chunks, or the parts of a pipeline.
        rows: feature rows of a forward, on which the projection's tile depends. The default is
            nine pictures.

    Raises:
        TypeError: the model is neither a module nor a sequence of them.
        ValueError: ``rows`` is below 1.
    """
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    chunks = chunks_of(model)
    modules: list[ModuleReport] = []
    for prefix, chunk in chunks:
        asked = _Asked(_gathered_in_forward(chunk), rows)
        for name, module in chunk.named_modules():
            modules += _reports_of(f"{prefix}{name}", module, asked)
    kinds = ", ".join(type(chunk).__name__ for _, chunk in chunks)
    why = f"nothing that step37 replaces in {kinds or 'an empty list'}"
    if any(getattr(m, "pre_process", None) is False for _, c in chunks for m in c.modules()):
        why += ": not the first pipeline stage"
    return Report(modules=tuple(modules), why="" if modules else why)


_Gathered = dict[tuple[int, str], Callable[[], Tensor]]
"""What makes a stand-in for a parameter that FSDP2 has sharded, by the module's id and its name
there."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """The forward that is asked about."""

    gathered: _Gathered
    rows: int


def _reports_of(name: str, module: nn.Module, asked: _Asked) -> Iterator[ModuleReport]:
    if isinstance(module, ImageInsertEmbedding):
        yield _report_of_ours(name, module, _EMBEDDING, asked)
    elif megatron.is_named_so(module):
        yield ModuleReport(
            name=name,
            cls=_dotted(type(module)),
            stock=_EMBEDDING,
            state="stock",
            why=_why_stock_embedding(name, module),
        )
    elif isinstance(module, automodel.FusedMerge):
        yield _report_of_ours(name, module, _MERGE, asked)
    elif automodel.is_named_so(module):
        remedy = (
            "step37_kernels.automodel: replace_in(model), or patch_step3p7() before it is built"
        )
        yield ModuleReport(
            name=name, cls=_dotted(type(module)), stock=_MERGE, state="stock", why=remedy
        )
    elif isinstance(module, RowGradient):
        dense = why_dense(module.weight)
        why = "where it is called, the gradient goes to rows of main_grad"
        if dense is not None:
            why = f"its gradient is stock's: {dense}"
        yield ModuleReport(name=name, cls=_dotted(RowGradient), stock=_TABLE, state="ours", why=why)
    elif megatron.is_tower(module):
        ours = megatron.keeps_channels_last(module)
        why = (
            "its last convolution has a channels-last input"
            if ours
            else ("replaced by channels_last=True alone, which is off unless asked for")
        )
        yield ModuleReport(
            name=name,
            cls=_dotted(type(module)),
            stock=_TOWER,
            state="ours" if ours else "stock",
            why=why,
        )


def _report_of_ours(name: str, module: Any, stock: str, asked: _Asked) -> ModuleReport:
    ours: type = automodel.FusedMerge if stock == _MERGE else ImageInsertEmbedding
    methods = automodel.REPLACED_METHODS if stock == _MERGE else ("forward",)
    notes = []
    for method in methods:
        own, whose = vars(module).get(method), "the instance"
        if own is None and getattr(type(module), method) is not getattr(ours, method):
            own, whose = getattr(type(module), method), "a class derived from ours"
        if own is not None:
            notes.append(
                f"{whose} has a {method} of its own, {origin_of(own)}: it runs in place of ours, "
                "which it may call"
            )
    state: State = "own forward" if notes else "ours"
    ways = None
    if lacking := _lacking(module):
        notes.append(lacking)
    else:
        seen = _as_in_forward(module, asked.gathered) if asked.gathered else module
        ways = seen._step37_ways(rows=asked.rows)
    return ModuleReport(
        name=name,
        cls=_dotted(next(c for c in type(module).__mro__ if _is_ours(c))),
        stock=stock,
        state=state,
        why="; ".join(notes),
        ways=ways,
    )


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("step37_kernels.")


def _lacking(module: Any) -> str:
    """What a module of ours has to have to embed, and has not."""
    if isinstance(module, ImageInsertEmbedding):
        needed = {"align_projector": getattr(module, "align_projector", None)}
    else:
        language_model = getattr(module, "language_model", None)
        needed = {
            "language_model.embed_tokens": getattr(language_model, "embed_tokens", None),
            "vit_large_projector": getattr(module, "vit_large_projector", None),
        }
    missing = [name for name, part in needed.items() if not isinstance(part, nn.Module)]
    return f"no {' and no '.join(missing)}: it embeds no pictures here" if missing else ""


def _why_stock_embedding(name: str, module: nn.Module) -> str:
    if not megatron.is_stock(module):
        return f"not of the shape of what is replaced: {megatron.description_of(name, module)}"
    if is_fsdp_unit(module):
        return (
            "an FSDP unit of its own: call step37_kernels.megatron.patch_step37() before the build"
        )
    own = vars(module).get("forward")
    if own is not None:
        return f"the instance has a forward of its own, put there by {origin_of(own)}"
    return "step37_kernels.megatron: replace_in(model), or patch_step37() before it is built"


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _gathered_in_forward(model: nn.Module) -> _Gathered:
    """Stand-ins, without memory of their own, for the parameters that FSDP2 gathers in a forward.

    Not for those that are distributed tensors in a forward, too (tensor parallelism).
    """
    from torch.distributed.fsdp import FSDPModule

    found: _Gathered = {}
    for unit in model.modules():
        if not isinstance(unit, FSDPModule):
            continue
        state: Any = unit._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # before PyTorch 2.12: one or None
        if groups is None:
            groups = [state._fsdp_param_group] if state._fsdp_param_group else []
        for parameter in (p for group in groups for p in group.fsdp_params):
            if parameter.is_dtensor:
                continue
            sharded, info = parameter.sharded_param, parameter._module_info
            dtype = state._mp_policy.param_dtype or sharded.dtype
            stand_in = functools.partial(_stand_in, sharded, dtype)
            places = [(info.module, info.param_name)]
            places += zip(info.shared_modules, info.shared_param_names, strict=True)
            found |= {(id(module), name): stand_in for module, name in places}
    return found


def _stand_in(sharded: Tensor, dtype: torch.dtype) -> Tensor:
    whole = torch.empty(1, dtype=dtype, device=sharded.device).expand(sharded.shape)
    return whole.requires_grad_(sharded.requires_grad)


def _as_in_forward(module: Any, gathered: _Gathered) -> Any:
    """A module of the same parts, with the stand-ins for its parameters and those of its children.

    A child that is an FSDP unit of its own is left as it is: it gathers in a call of its own.
    """
    twin = object.__new__(type(module))
    held = vars(module)
    vars(twin).update(held)
    vars(twin)["_parameters"] = {
        name: make() if (make := gathered.get((id(module), name))) else parameter
        for name, parameter in held["_parameters"].items()
    }
    vars(twin)["_modules"] = {
        name: _child_in_forward(child, gathered) for name, child in held["_modules"].items()
    }
    if isinstance(module, ImageInsertEmbedding):
        vars(twin)["_language_embedding"] = _child_in_forward(module._language_embedding, gathered)
    return twin


def _child_in_forward(child: Any, gathered: _Gathered) -> Any:
    if not isinstance(child, nn.Module) or is_fsdp_unit(child):
        return child
    return _as_in_forward(child, gathered)
