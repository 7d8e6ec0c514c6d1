"""Replaces a framework's class by ours, in the modules that look it up by name, and undoes that.

Our classes derive from the framework's: see :func:`with_mixin`.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, SupportsIndex

from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPatch:
    """A class of a framework that can be replaced by ours."""

    caller: str
    """The name of the function that patches, for messages."""
    remedy: str
    """What a user should call for models that exist already, for messages."""
    modules: tuple[str, ...]
    """The modules in which the class is looked up by name."""
    name: str
    distribution: str
    """The framework's name on the package index."""
    known: str
    """Releases of the framework that have the class in these modules, for messages."""
    methods: tuple[tuple[str, ...], ...] = ()
    """Methods that our class needs: at least one of each entry."""
    _stock: dict[str, type[nn.Module]] = field(default_factory=dict)
    # The stock class by module name; empty while nothing is patched.
    _put: dict[str, type[nn.Module]] = field(default_factory=dict)

    def apply(
        self, make: Callable[[type[nn.Module]], type[nn.Module]], base: type
    ) -> tuple[str, ...]:
        """Replace the class in all modules, except where ours is already; in none if that fails.

        Args:
            make: returns our class for the stock one.
            base: a base that all our classes have.

        Returns:
            The dotted names that hold our class now.

        Raises:
            ImportError: a module, the name in it, or a method of the class is missing.
        """
        found = self.find()
        replaced = {name: cls for name, cls in found.items() if not issubclass(cls, base)}
        if replaced:
            self._warn_of_what_stays(set(replaced.values()))
        for name, cls in replaced.items():
            self._stock[name], self._put[name] = cls, make(cls)
            setattr(sys.modules[name], self.name, self._put[name])
        return tuple(f"{name}.{self.name}" for name in self.modules)

    def find(self) -> dict[str, type[nn.Module]]:
        """The class that each module has under the name now; imports the modules.

        Raises:
            ImportError: a module, the name in it, or a method of the class is missing.
        """
        modules = {name: self._import(name) for name in self.modules}
        return {name: self._look_up(module) for name, module in modules.items()}

    def undo(self) -> tuple[str, ...]:
        """Put the stock class back where ours still is; returns the dotted names that hold it."""
        restored = []
        for name, cls in self._stock.items():
            module = sys.modules.get(name)
            current = getattr(module, self.name, None)
            if current is self._put[name]:
                setattr(module, self.name, cls)
                restored.append(f"{name}.{self.name}")
            else:
                logger.warning(
                    "%s.%s is %r, not what %s put there: left alone",
                    name,
                    self.name,
                    current,
                    self.caller,
                )
        self._stock.clear()
        self._put.clear()
        if restored:
            logger.info("unpatched: %s", ", ".join(restored))
        return tuple(restored)

    def refuse_without_methods(self, name: str, module: nn.Module) -> None:
        """Raise ``ValueError`` if an existing module lacks one of :attr:`methods`.

        Args:
            name: of the module in its model, for the message.
            module: whose class is to be changed.
        """
        cls = type(module)
        if lacking := self._lacking(cls):
            raise ValueError(
                f"{name or cls.__name__}: {cls.__module__}.{cls.__qualname__} has no method "
                f"{lacking}, which ours needs. "
                f"Known to work: {self.known}; installed: {self._installed()}"
            )

    def _lacking(self, cls: type) -> str:
        return ", no ".join(
            " or ".join(names)
            for names in self.methods
            if not any(callable(getattr(cls, name, None)) for name in names)
        )

    def _import(self, name: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or name
            if not f"{name}.".startswith(f"{missing}."):
                # The framework is installed but lacks a dependency: its own error says which.
                raise
            message = self._missing(f"module {name}", f"no module {missing}")
            raise ImportError(message, name=name) from error

    def _look_up(self, module: ModuleType) -> type[nn.Module]:
        cls = getattr(module, self.name, None)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            found = "no such name" if cls is None else f"found {cls!r}"
            message = self._missing(f"{module.__name__}.{self.name}", found)
            raise ImportError(message, name=module.__name__)
        if lacking := self._lacking(cls):
            message = self._missing(f"{module.__name__}.{self.name}", f"it has no method {lacking}")
            raise ImportError(message, name=module.__name__)
        return cls

    def _missing(self, what: str, found: str) -> str:
        return (
            f"{self.caller}: cannot replace {what}: {found}. "
            f"Known to work: {self.known}; installed: {self._installed()}"
        )

    def _installed(self) -> str:
        try:
            return f"{self.distribution} {importlib.metadata.version(self.distribution)}"
        except importlib.metadata.PackageNotFoundError:
            return f"no {self.distribution} distribution"

    def _warn_of_what_stays(self, stock: set[type[nn.Module]]) -> None:
        built = sum(1 for _ in _instances(stock))
        if built:
            logger.warning(
                "%s after %d stock %s had been built: existing models keep it; call %s on them",
                self.caller,
                built,
                self.name,
                self.remedy,
            )
        bound = sorted(
            name
            for name, module in tuple(sys.modules.items())
            if name not in self.modules
            and any(getattr(module, "__dict__", {}).get(self.name) is cls for cls in stock)
        )
        if bound:
            logger.warning(
                "%s leaves the stock class in modules that imported it by name before: %s",
                self.caller,
                ", ".join(bound),
            )


class AfterBuilding:
    """Does something to every model that a framework's class builds from now on; until undone.

    The class stays the object it is, so that it does not matter who imported it by name before.

    Args:
        act: is called with each model, behind the class's ``__init__``.
    """

    def __init__(self, act: Callable[[nn.Module], None]) -> None:
        self._act = act
        self._active = False
        self._cls: type[nn.Module] | None = None
        self._stock: Any = None
        self._put: Any = None

    def apply(self, cls: type[nn.Module]) -> None:
        """Begin; what is applied already stays as it is."""
        if self._active and self._cls is cls:
            return
        self.undo()
        self._cls, self._stock, self._active = cls, cls.__init__, True
        self._put = self._made(cls.__init__)
        cls.__init__ = self._put  # type: ignore[method-assign]

    def _made(self, stock: Any) -> Any:
        @functools.wraps(stock)
        def init(module: nn.Module, *arguments: Any, **options: Any) -> None:
            stock(module, *arguments, **options)
            # Where somebody has wrapped this function in turn, undo cannot take it away.
            if self._put is init and self._active:
                self._act(module)

        return init

    def undo(self) -> None:
        """End, and give the class its own ``__init__`` again."""
        if self._active and self._cls is not None and self._cls.__init__ is self._put:
            self._cls.__init__ = self._stock  # type: ignore[method-assign]
        self._active = False


class Mixin:
    """Base of the classes that :func:`with_mixin` puts before a framework's class.

    Pickle cannot find a class that is made at run time, since it is in no module. So its instances
    are pickled and copied by way of the two classes that it was made of.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        cls = type(self)
        if _made.get(cls.__bases__) is not cls:
            # A class derived from ours, such as the one that fully_shard makes, does this itself.
            return super().__reduce_ex__(protocol)
        mixin, stock = cls.__bases__
        # While the patch is active, the stock class's name leads to our class.
        module = sys.modules.get(cls.__module__)
        named = cls if getattr(module, cls.__name__, None) is cls else stock
        default: Any = super().__reduce_ex__(2)
        return _new, (mixin, named), *default[2:]


def with_mixin(mixin: type[Mixin], stock: type[nn.Module]) -> type[nn.Module]:
    """Make the subclass of ``mixin`` and ``stock``, under stock's name; one for each pair."""
    if issubclass(stock, mixin):
        return stock
    if (mixin, stock) not in _made:
        body = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
        _made[mixin, stock] = type(stock.__name__, (mixin, stock), body)
    return _made[mixin, stock]


def without_mixin(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the stock class that :func:`with_mixin` made ``cls`` from; any other class itself."""
    stock: type[nn.Module] = cls.__bases__[1] if _made.get(cls.__bases__) is cls else cls
    return stock


_made: dict[tuple[type, ...], type[nn.Module]] = {}


def _new(mixin: type[Mixin], stock: type[nn.Module]) -> nn.Module:
    cls = with_mixin(mixin, stock)
    return cls.__new__(cls)


def chunks_of(model: nn.Module | Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """List the chunks of a model, each with the prefix of its modules' names.

    Raises:
        TypeError: the model is neither a module nor a sequence of them.
    """
    if isinstance(model, nn.Module):
        return [("", model)]
    if (
        not isinstance(model, Sequence)
        or isinstance(model, str)
        or not all(isinstance(chunk, nn.Module) for chunk in model)
    ):
        raise TypeError(f"model: expected a module or a list of modules, got {type(model)}")
    return [(f"{i}.", chunk) for i, chunk in enumerate(model)]


def is_fsdp_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has changed the module's class, to gather its parameters in a call.

    Either PyTorch's, or the one in Megatron-FSDP's ``experimental`` package, if that is installed.
    """
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule) or any(
        cls.__name__ == "FsdpModule" and "megatron_fsdp" in cls.__module__.split(".")
        for cls in type(module).__mro__
    )


def refuse_own_methods(name: str, module: nn.Module, methods: Sequence[str]) -> None:
    """Raise ``ValueError`` if the instance itself, not its class, has one of the methods.

    Python prefers a method of the instance to that of its class, so a change of the class would not
    replace it. The hooks of accelerate, and patches of single methods, set such a method.

    Args:
        name: of the module in its model, for the message.
        module: whose class is to be changed.
        methods: the methods that our class replaces.
    """
    for method in methods:
        own = vars(module).get(method)
        if own is None:
            continue
        raise ValueError(
            f"{name or type(module).__name__}: the instance has a {method} of its own, which "
            f"{origin_of(own)} put there and which would run in place of the class's: remove it, "
            "call replace_in, and put it there again"
        )


def origin_of(function: Any) -> str:
    """Dotted name of what a function, or the one inside of a partial, was defined as."""
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__module__", None) or type(function).__module__
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _instances(classes: set[type[nn.Module]]) -> Iterator[object]:
    bases = tuple(classes)
    for candidate in gc.get_objects():
        # type() and not isinstance(), which reads __class__ of proxies: that may run any code.
        if issubclass(type(candidate), bases):
            yield candidate
