"""A kernel: one reference definition, plus optional specialisations by array library.

This is functools.singledispatch with Python's operator protocol: a specialisation that does not handle its
arguments returns NotImplemented, and the reference runs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast, get_args

from arraynorm import _array

P = ParamSpec("P")
R = TypeVar("R")
Paths = Literal["any", "reference", "specialised"]

BACKENDS: dict[str, str] = {"numpy": "arraynorm.kernels.cpu", "cupy": "arraynorm.kernels.cuda"}
"""Array library -> the module that registers its specialisations, imported at the library's first kernel call."""

_log = logging.getLogger("arraynorm.kernels")
allowed_paths: ContextVar[Paths] = ContextVar("arraynorm_allowed_paths", default="any")
"""What `only` sets. The compiled module reads this very object too: see `Kernel.register_direct`."""


class Kernel(Generic[P, R]):
    """A reference function that dispatches to specialisations on the library of its first argument."""

    def __init__(self, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.__name__ = reference.__name__
        self.reference = reference
        self.specialised: dict[str, Callable[P, R]] = {}
        self.direct: Callable[..., Any] = _step_by_step
        """What a public call comes to, found in one step; or None, and then it is checked and taken step by step."""
        self._direct_library: str | None = None

    def register(self, library: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: add a specialisation for `library`, with exactly the reference's parameters.

        It may return NotImplemented to decline; it must do so before it writes to an output.
        """

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            ours, theirs = inspect.signature(self.reference), inspect.signature(function)
            if list(ours.parameters) != list(theirs.parameters):
                raise TypeError(f"{function.__qualname__}{theirs} must have the signature {self.__name__}{ours}")
            if library == self._direct_library:
                self.direct = _step_by_step  # no longer what the specialisation would give
            self.specialised[library] = function
            return function

        return add

    def register_direct(self, library: str, function: Callable[..., Any]) -> None:
        """Let `function` answer whole public calls in place of the specialisation for `library`.

        Small arrays take less time than a check in Python does, so nothing is asked before `function` is called. It
        must answer None to arrays of other libraries, to calls that would not pass the checks, and where
        `allowed_paths` is "reference"; else it gives the bits that the specialisation gives, and for a NaN a NaN.
        """
        self.direct, self._direct_library = function, library

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        allowed = allowed_paths.get()
        library = _array.library(args[0])
        _load_backend(library)
        specialisation = self.specialised.get(library)
        if specialisation is not None and allowed != "reference":
            result = specialisation(*args, **kwargs)
            if result is not NotImplemented:
                return result
        x = cast(Any, args[0])
        if allowed == "specialised":
            raise NotImplementedError(f"{self.__name__}: no specialisation for {library} took {x.dtype} {x.shape}")
        if specialisation is not None and allowed != "reference":
            _log.debug("%s: the %s specialisation declined %s %s", self.__name__, library, x.dtype, x.shape)
        with _array.silent():
            return self.reference(*args, **kwargs)


def _step_by_step(*_: object) -> None:
    """The direct function of a kernel that has none."""


@functools.cache
def _load_backend(library: str) -> None:
    if library in BACKENDS:
        importlib.import_module(BACKENDS[library])


@contextmanager
def only(paths: Paths) -> Iterator[None]:
    """Restrict the calls of this context to one path, so that a test can't compare the reference with itself.

    Parameters
    ----------
    paths : "reference", "specialised" or "any"
        Under "specialised" a declined call raises NotImplementedError.
    """
    if paths not in get_args(Paths):
        raise ValueError(f"only: paths must be one of {get_args(Paths)}, got {paths!r}")
    token = allowed_paths.set(paths)
    try:
        yield
    finally:
        allowed_paths.reset(token)
