"""The seam of the kernels: a reference, specialisations that may decline, and no way to compare one with itself."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
import threading
import types

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels import Kernel, _kernel, only
from arraynorm.kernels.reference.batch_norm import batch_norm_forward, batch_norm_stats
from norms import EXAMPLES, Example, backward, draw, draw_dy, forward, kernels, specialise


def _double(x, factor):
    """x times 2, whatever the factor."""
    return ("reference", x * 2)


@pytest.fixture
def kernel():
    return Kernel(_double)


X = np.ones((2, 3), np.float32)


# -- registering -----------------------------------------------------------------------------------------------


def test_a_kernel_is_its_reference_by_name_and_docstring(kernel):
    assert (kernel.__name__, kernel.__doc__, kernel.__wrapped__) == ("_double", _double.__doc__, _double)
    assert inspect.signature(kernel) == inspect.signature(_double)


def test_without_a_specialisation_the_reference_runs(kernel):
    assert kernel(X, 3)[0] == "reference"


def test_a_specialisation_is_chosen_by_the_library_of_the_first_argument(kernel):
    def fast(x, factor):
        return ("fast", x * 2)

    assert kernel.register("numpy")(fast) is fast
    assert kernel(X, 3)[0] == "fast"
    assert kernel(_array_of("elsewhere"), 3)[0] == "reference"


def test_a_second_registration_replaces_the_first(kernel):
    """As in functools.singledispatch."""
    kernel.register("numpy")(lambda x, factor: ("first", x))
    kernel.register("numpy")(lambda x, factor: ("second", x))
    assert kernel(X, 3)[0] == "second"


def test_a_second_registration_ends_what_is_answered_in_one_step(kernel):
    """That would be the first one's."""
    kernel.register("numpy")(lambda x, factor: ("first", x))
    kernel.register_direct("numpy", lambda *_: "first")
    for _ in range(2):
        kernel.register("elsewhere")(lambda x, factor: ("elsewhere", x))
    assert kernel.direct(X, 3) == "first"
    kernel.register("numpy")(lambda x, factor: ("second", x))
    assert kernel.direct(X, 3) is None


_MISFITS = [lambda x: 0, lambda factor, x: 0, lambda x, factor, out: 0, lambda x, scale: 0, lambda *args: 0]


@pytest.mark.parametrize("function", _MISFITS, ids=["fewer", "swapped", "more", "renamed", "any"])
def test_a_specialisation_with_other_parameters_is_refused(kernel, function):
    with pytest.raises(TypeError, match=r"<lambda>\(.*\) must have the signature _double\(x, factor\)"):
        kernel.register("numpy")(function)
    assert kernel.specialised == {}


# -- declining -------------------------------------------------------------------------------------------------


def test_a_specialisation_declines_by_returning_not_implemented(kernel):
    seen = []

    @kernel.register("numpy")
    def only_float64(x, factor):
        seen.append(x.dtype)
        return ("fast", x * 2) if x.dtype == np.float64 else NotImplemented

    assert kernel(X, 3)[0] == "reference"
    assert kernel(X.astype(np.float64), 3)[0] == "fast"
    assert seen == [np.float32, np.float64]


def test_an_error_in_a_specialisation_is_not_a_decline(kernel):
    @kernel.register("numpy")
    def broken(x, factor):
        raise NotImplementedError("half a kernel")

    with pytest.raises(NotImplementedError, match="half a kernel"):
        kernel(X, 3)


def test_a_decline_is_logged_for_debugging_with_what_was_declined(kernel, caplog):
    kernel.register("numpy")(lambda x, factor: NotImplemented)
    with caplog.at_level(logging.DEBUG, logger="arraynorm.kernels"):
        kernel(X, 3)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("arraynorm.kernels", logging.DEBUG)
    assert record.getMessage() == "_double: the numpy specialisation declined float32 (2, 3)"


def test_nothing_is_logged_where_nobody_declines(kernel, caplog):
    with caplog.at_level(logging.DEBUG, logger="arraynorm.kernels"):
        kernel(X, 3)
        kernel.register("numpy")(lambda x, factor: ("fast", x))
        kernel(X, 3)
        with only("reference"):
            kernel(X, 3)
    assert not caplog.records


# -- only ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast_kernel(kernel):
    kernel.register("numpy")(lambda x, factor: ("fast", x))
    return kernel


def test_only_reference_leaves_specialisations_out(fast_kernel):
    with only("reference"):
        assert fast_kernel(X, 3)[0] == "reference"
    assert fast_kernel(X, 3)[0] == "fast"


def test_an_inner_restriction_replaces_the_outer_one_for_its_time(fast_kernel):
    with only("reference"):
        with only("any"):
            assert fast_kernel(X, 3)[0] == "fast"
        assert fast_kernel(X, 3)[0] == "reference"


def test_only_specialised_takes_the_specialisation(fast_kernel):
    with only("specialised"):
        assert fast_kernel(X, 3)[0] == "fast"


@pytest.mark.parametrize("declines", [False, True], ids=["there is none", "it declines"])
def test_only_specialised_raises_where_the_reference_would_run(kernel, declines):
    if declines:
        kernel.register("numpy")(lambda x, factor: NotImplemented)
    message = r"^_double: no specialisation for numpy took float32 \(2, 3\)$"
    with only("specialised"), pytest.raises(NotImplementedError, match=message):
        kernel(X, 3)


def test_a_restriction_ends_with_its_context_even_by_an_exception(fast_kernel):
    with pytest.raises(ZeroDivisionError), only("reference"):
        _ = 1 / 0
    assert fast_kernel(X, 3)[0] == "fast"


def test_a_restriction_is_of_its_own_thread(fast_kernel):
    results = []
    with only("reference"):
        thread = threading.Thread(target=lambda: results.append(fast_kernel(X, 3)[0]))
        thread.start()
        thread.join()
    assert results == ["fast"]


@pytest.mark.parametrize("paths", ["specialized", "fast", "", None])
def test_a_restriction_that_does_not_exist_is_refused(paths):
    """A misspelt one that meant nothing would let a test compare the reference with itself."""
    with pytest.raises(ValueError, match="reference"), only(paths):
        pass


# -- backends --------------------------------------------------------------------------------------------------


def _array_of(library: str) -> np.ndarray:
    """An array whose type says that it comes from `library`."""
    kind = type("Array", (np.ndarray,), {"__module__": f"{library}.core"})
    return X.view(kind)


@pytest.fixture
def made_up(monkeypatch, kernel):
    """A backend for a library that does not exist: a module which counts its imports and registers on `kernel`."""
    imports = []

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return importlib.util.spec_from_loader(name, Finder) if name == "made_up_backend" else None

        @staticmethod
        def create_module(spec):
            return types.ModuleType(spec.name)

        @staticmethod
        def exec_module(module):
            imports.append(module.__name__)
            kernel.register("made_up")(lambda x, factor: ("made up", x))

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    monkeypatch.setitem(_kernel.BACKENDS, "made_up", "made_up_backend")
    _kernel._load_backend.cache_clear()
    yield imports
    sys.modules.pop("made_up_backend", None)
    _kernel._load_backend.cache_clear()


def test_a_backend_is_imported_at_the_first_call_for_its_library_and_once(kernel, made_up):
    assert kernel(X, 3)[0] == "reference"
    assert made_up == []
    for _ in range(3):
        assert kernel(_array_of("made_up"), 3)[0] == "made up"
    assert made_up == ["made_up_backend"]
    assert kernel(X, 3)[0] == "reference"


def test_only_reference_holds_for_a_backend_that_is_imported_then(kernel, made_up):
    with only("reference"):
        assert kernel(_array_of("made_up"), 3)[0] == "reference"


# -- of the package --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kernels())
def test_every_kernel_is_documented_and_has_positional_parameters_without_defaults(name):
    kernel = kernels()[name]
    assert kernel.__name__ == name
    assert kernel.__doc__
    for parameter in inspect.signature(kernel).parameters.values():
        assert (parameter.kind, parameter.default) == (parameter.POSITIONAL_OR_KEYWORD, parameter.empty)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.op)
def test_every_op_runs_on_kernels_and_on_nothing_else(monkeypatch, example: Example):
    """Specialisations that only count, and then call the reference, change no bit and see every call."""
    given, dy = draw(example), draw_dy(example)
    with only("reference"):
        y, cache = forward(example, given)
        wanted = [y, *backward(example, dy, cache)]
    called = []
    for name, kernel in kernels().items():

        def counting(*args, name=name, kernel=kernel):
            called.append(name)
            return kernel.reference(*args)

        specialise(monkeypatch, kernel, counting)
    with only("specialised"):
        y, cache = forward(example, given)
        after_forward = len(called)
        actual = [y, *backward(example, dy, cache)]
    assert 0 < after_forward < len(called)
    for a, b in zip(actual, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_op_takes_what_a_specialisation_returns(monkeypatch):
    def statistics_of_zeros(x):
        return np.zeros(x.shape[1]), np.zeros(x.shape[1])

    specialise(monkeypatch, batch_norm_stats, statistics_of_zeros)
    x = np.random.default_rng(0).standard_normal((4, 3))
    np.testing.assert_array_equal(an.batch_norm(x, eps=0.25, comm=an.distributed.SELF), x * 2)
    with only("reference"):
        assert not np.array_equal(an.batch_norm(x, eps=0.25, comm=an.distributed.SELF), x * 2)


def test_a_specialisation_writes_to_out_in_the_kernels_view(monkeypatch):
    """(N, C, S), and the caller's own memory where a view of it has that shape."""
    seen = []

    def remember(x, weight, bias, eps, out):
        seen.append((x.shape, out.shape, out.base is mine))
        return NotImplemented

    specialise(monkeypatch, batch_norm_forward, remember)
    mine = np.empty((2, 3, 4, 5))
    an.batch_norm(np.ones((2, 3, 4, 5)), out=mine)
    assert seen == [((2, 3, 20), (2, 3, 20), True)]


def test_the_reference_raises_no_floating_point_warnings(kernel):
    """Warnings are errors here: a NaN in a channel, or a float16 result beyond 65504, is a value and no event."""
    divide = Kernel(lambda x: x / 0)
    assert np.isinf(divide(X)).all()
    with np.errstate(all="raise"):
        assert np.isnan(an.layer_norm(np.array([[np.inf, 1.0]], np.float32), 2)).all()
