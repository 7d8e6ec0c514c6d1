"""Decides whether the table of a language embedding can stand for calling it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module

from step37_kernels.integration.projector import hooks_are_of_megatron, run_forward_pre_hooks


class PlainTable(NamedTuple):
    """The table of an embedding that only looks up."""

    weight: Tensor
    """``[V, H]``"""
    modules: Sequence[nn.Module]
    """The modules that a call of the embedding would call; Megatron's hooks on them still run."""

    def run_hooks(self) -> None:
        """Run the forward pre-hooks of these modules; Megatron's wait for parameters."""
        for module in self.modules:
            run_forward_pre_hooks(module)


def call_embedding(embedding: Any, input_ids: Tensor, position_ids: Tensor | None) -> Any:
    """Call a language embedding as Megatron does, or an ``nn.Embedding``; returns ``[S, B, H]``."""
    if isinstance(embedding, nn.Embedding) and type(embedding).forward is nn.Embedding.forward:
        return embedding(input_ids).transpose(0, 1)
    return embedding(input_ids=input_ids, position_ids=position_ids)


def plain_table(embedding: Any) -> PlainTable | str:
    """Return the table of a language embedding that only looks up, or say why it must be called.

    That is an ``nn.Embedding``, or Megatron-Core's ``LanguageModelEmbedding`` with one
    tensor-parallel rank, without position and token-type embeddings, dropout in effect, fp32
    residual connection, scaling (muP), and hooks that are not Megatron's, whether of its own or for
    all modules (``torch.nn.modules.module.register_module_forward_hook``).
    """
    kind = type(embedding)
    if kind is nn.Embedding:
        words, modules = embedding, [embedding]
        reason = _more_than_an_embedding(embedding)
    elif _is_of_megatron(kind, "LanguageModelEmbedding"):
        words = embedding.word_embeddings
        modules = [embedding, words]
        reason = _more_than_megatrons(embedding, words)
    else:
        return f"{kind.__name__} is not known to be nothing but a lookup"
    if reason is not None:
        return reason
    weight = words.weight
    return _more_than_a_weight(weight, modules) or PlainTable(weight, modules)


def _is_of_megatron(kind: type, name: str) -> bool:
    return kind.__module__.startswith("megatron.core.") and kind.__name__ == name


def _has_stock_forward(kind: type[nn.Module]) -> bool:
    """Whether nobody put another function, or one around it, in place of the class's forward.

    Megatron-Core's own decorator is allowed around it, which marks the call for NVTX.
    """
    forward = kind.forward
    # Of a decorator these globals are its own; __module__ is that of the function inside.
    if hasattr(forward, "__wrapped__") and forward.__globals__["__name__"] == "megatron.core.utils":
        forward = forward.__wrapped__
    defined_in = forward.__module__.split(".")[0]
    return defined_in in ("torch", "megatron", "step37_kernels") and not hasattr(
        forward, "__wrapped__"
    )


def _more_than_an_embedding(embedding: nn.Embedding) -> str | None:
    if embedding.max_norm is not None:
        return "max_norm changes the table's rows"
    if embedding.sparse:
        return "its gradient is sparse"
    if embedding.scale_grad_by_freq:
        return "its gradient is scaled by frequency"
    if embedding.padding_idx is not None:
        return "the row of padding_idx gets no gradient"
    return None


def _more_than_megatrons(embedding: Any, words: Any) -> str | None:
    config = embedding.config
    if not _is_of_megatron(type(words), "VocabParallelEmbedding"):
        return f"its word_embeddings are {type(words).__name__}"
    if words.tp_group.size() > 1:
        return f"the table is divided among {words.tp_group.size()} tensor-parallel ranks"
    if embedding.add_position_embedding:
        return "it adds position embeddings"
    if embedding.tokentype_embeddings is not None:
        return "it adds token-type embeddings"
    if embedding.embedding_dropout.training and embedding.embedding_dropout.p > 0:
        return "its dropout is in effect"
    if config.fp32_residual_connection:
        return "fp32_residual_connection makes its rows fp32"
    if getattr(config, "use_mup", False) and config.mup_embedding_mult != 1.0:
        return "muP scales its rows"
    return None


def _more_than_a_weight(weight: Any, modules: Sequence[nn.Module]) -> str | None:
    if type(weight) not in (nn.Parameter, Tensor, FakeTensor):
        return f"its table is a {type(weight).__name__} (quantised or distributed)"
    if hasattr(weight, "__fsdp_param__"):
        return "Megatron-FSDP shards its table"
    if torch_module._has_any_global_hook():
        return "there are hooks for the calls of all modules"
    for module in modules:
        if "forward" in vars(module):
            return f"the instance of {type(module).__name__} has a forward of its own"
        if not _has_stock_forward(type(module)):
            return f"the forward of {type(module).__name__} was replaced"
        if not hooks_are_of_megatron(module):
            return f"{type(module).__name__} has hooks"
    return None
