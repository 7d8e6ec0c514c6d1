"""Checks arguments, with errors that name them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, get_args


def checked_int(name: str, value: Any, least: int = 1) -> int:
    """Return ``value`` as an int.

    Raises:
        ValueError: it is no integer (2.0 is not one), or below ``least``; the message has ``name``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def checked_choice(name: str, value: Any, choices: Any) -> Any:
    """Return ``value`` if it is one of the values of a ``Literal``.

    Raises:
        ValueError: it is another value; the message has ``name``.
    """
    if value not in get_args(choices):
        known = ", ".join(get_args(choices))
        raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    return value


def checked_state(state: Any, *keys: str) -> Mapping[str, Any]:
    """Return ``state`` if it is a mapping with these keys, as ``state_dict()`` returns it.

    Raises:
        ValueError: it is no mapping, or lacks one of the keys.
    """
    if not isinstance(state, Mapping) or not state.keys() >= set(keys):
        got = f"only {sorted(state)}" if isinstance(state, Mapping) else repr(state)
        raise ValueError(f"state_dict: expected {' and '.join(keys)}, got {got}")
    return state


def item_at(dataset: Any, index: int, name: str = "pack") -> Any:
    """Return ``dataset[index]``.

    Raises:
        RuntimeError: the data set raised ``StopIteration``, which would silently end an iterator
            that calls this.
    """
    try:
        return dataset[index]
    except StopIteration as error:
        raise RuntimeError(f"{name} {index}: the data set raised StopIteration") from error
