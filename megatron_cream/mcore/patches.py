# SPDX-License-Identifier: Apache-2.0
"""The registry of patches: which names of Megatron's are replaced, why, and the one way to do it.

A patch is declared beside what it is for, and does nothing until a run applies it:

    @patch("megatron.core.datasets.utils:compile_helpers", why="...")
    def patch_compile_helpers(own):
        return lambda: None

    patch_compile_helpers.apply()

Hooks of Megatron's come first; a patch is what is left where there is none.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_cream.errors import MissingPackageError, UserError

RELEASE = "0.19.2"
"""The megatron-core that patches and hooks are made for."""

MARK = "__megatron_cream_patch__"
"""Attribute of every replacement: what was there before."""

_DECLARED_IN = ("rotary", "trainer", "cpu")  # modules of this package


@dataclass(frozen=True, eq=False)
class Patch:
    """One name that is replaced.

    Attributes:
        symbols: ``module:attribute.path`` of the name, and of other names of the same object.
        why: in a sentence.
        group: what several patches are listed as.
        needs: parameters of the function that the replacement relies on.
        make: returns the replacement of its first argument, or that itself to leave it; takes the
            settings that ``apply`` is given.
    """

    symbols: tuple[str, ...]
    why: str
    group: str
    needs: tuple[str, ...]
    make: Callable[..., Any]

    def apply(self, *settings: Any) -> Any:
        """Put the replacement in place and return it. Idempotent; with settings the last call wins.

        Raises:
            ImportError: this release of Megatron has no such name or parameter.
        """
        current = self.current()
        if hasattr(current, MARK) and not settings:
            return current
        own = getattr(current, MARK, current)
        replacement = self.make(own, *settings)
        if replacement is not own:
            setattr(replacement, MARK, own)
            self._set(replacement)
        return replacement

    @property
    def in_place(self) -> bool:
        """Whether the name is replaced in this process now."""
        module = self.symbols[0].partition(":")[0]
        return module in sys.modules and hasattr(self.current(), MARK)

    def current(self) -> Any:
        """Return what is under the name now.

        Raises:
            ImportError: this release of Megatron has no such name or parameter.
        """
        for symbol in self.symbols:
            owner, name = _owner(symbol)
            if not hasattr(owner, name):
                raise missing(symbol)
        current = getattr(owner, name)
        known = inspect.signature(current).parameters if self.needs else {}
        wrapped = any(each.kind is each.VAR_KEYWORD for each in known.values())
        for parameter in () if wrapped else self.needs:
            if parameter not in known:
                raise missing(f"{symbol}({parameter})")
        return current

    def _set(self, value: Any) -> None:
        for symbol in self.symbols:
            owner, name = _owner(symbol)
            setattr(owner, name, value)


_patches: dict[str, Patch] = {}


def patch(
    symbol: str, *others: str, why: str, group: str | None = None, needs: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Patch]:
    """Declare a patch of ``symbol``; decorates what makes the replacement. See ``Patch``.

    Args:
        symbol: ``module:attribute.path``.
        others: names under which the same object is found.
        group: the name in listings; that of the symbol unless given.
    """

    def declare(make: Callable[..., Any]) -> Patch:
        if symbol in _patches:
            raise ValueError(f"{symbol} has a patch: one name has one")
        name = group or symbol.rpartition(":")[2]
        _patches[symbol] = Patch((symbol, *others), why, name, needs, make)
        return _patches[symbol]

    return declare


def registered() -> list[Patch]:
    """Return all patches of the package, applied or not; imports Megatron."""
    for name in _DECLARED_IN:
        importlib.import_module(f"megatron_cream.mcore.{name}")
    return list(_patches.values())


def listing() -> list[str]:
    """Return a line for each patch, a group in one: what is replaced, and why."""
    groups: dict[str, list[Patch]] = {}
    for each in registered():
        groups.setdefault(each.group, []).append(each)
    lines = []
    for group, own in groups.items():
        what = own[0].symbols[0] if len(own) == 1 else f"{group} ({len(own)} names)"
        lines.append(f"{what}: {own[0].why}")
    return lines


def validate_all() -> str:
    """Hold every patch against the installed release; return a line that says so.

    Raises:
        ImportError: the release does not have a name or parameter.
    """
    found = registered()
    for each in found:
        each.current()
    return f"{len(found)} patches fit the installed megatron-core"


def applied() -> list[str]:
    """Return the names of what is replaced in this process now, each group once."""
    return list(dict.fromkeys(each.group for each in _patches.values() if each.in_place))


def validate_release(advice: str) -> None:
    """Refuse a megatron of another release than this package is made for.

    pip sees to it for an installed one; a clone beside a script comes before that.

    Args:
        advice: what to do.

    Raises:
        UserError: naming where it was found.
    """
    from megatron.core import package_info

    wanted = RELEASE.rpartition(".")[0]
    if f"{package_info.MAJOR}.{package_info.MINOR}" != wanted:
        raise UserError(
            f"megatron-core is {package_info.__shortversion__}, from {package_info.__file__}: it "
            f"must be {wanted}; {advice}"
        )


def set_built(module: Any, name: str, value: Any) -> None:
    """Set an attribute of a module that Megatron has built, which must be there.

    Raises:
        ImportError: this release of Megatron has no such attribute.
    """
    if not hasattr(module, name):
        kind = type(module)
        raise missing(f"{kind.__module__}:{kind.__qualname__}.{name}")
    setattr(module, name, value)


def missing(symbol: str) -> MissingPackageError:
    """Return the error of a name that the installed release does not have."""
    package = symbol.replace(":", ".").partition(".")[0]
    package = "megatron.core" if package == "megatron" else package
    release = getattr(importlib.import_module(package), "__version__", "of unknown release")
    release = release.partition("+")[0]  # Megatron adds the commit of the folder it runs in
    return MissingPackageError(
        f"{symbol.replace(':', '.')} is gone from {package.replace('.', '-')} {release}: it may "
        f"have changed; megatron_cream is made for megatron-core {RELEASE}"
    )


def _owner(symbol: str) -> tuple[Any, str]:
    """Return the module or class that holds a symbol, and its name there."""
    module, _, path = symbol.partition(":")
    *parents, name = path.split(".")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:
        raise missing(symbol) from None
    for parent in parents:
        if not hasattr(owner, parent):
            raise missing(symbol)
        owner = getattr(owner, parent)
    return owner, name
