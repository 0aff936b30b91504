"""What came of a call: was the error the documented one, was anything changed, is the answer the same."""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import arraynorm as an
from namespaces import to_numpy

PACKAGE = Path(an.__file__).parent
# Texts of torch that users search for, kept word by word (behaviours 8 to 15, 21, 31, 45).
ESTABLISHED = [
    r"expected (at least )?\d+D( or \d+D)* input \(got \d+D input\)",
    r"Expected more than 1 (value per channel|spatial element) when training, got .+",
    r"Given normalized_shape=\[.*\], expected input with shape \[\*.*\], but got input of size \(.*\)",
    r"num_channels must be divisible by num_groups, got num_channels=\d+, num_groups=\d+",
    r"running_mean and running_var must either both be None or neither be None",
    r"Input shape must be `\(N, C, .*\)`!",
    r"SyncBatchNorm number of input channels should be non-zero",
    r"Error\(s\) in loading state_dict for \w+:(\n\t.+)+",
]


def picture(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """Everything that a call could change of a value, comparable with ==: bytes, shapes, identities, attributes."""
    if isinstance(value, np.ndarray) and value is not np.ma.masked:  # which refuses to be looked at
        mask = value.mask.tobytes() if isinstance(value, np.ma.MaskedArray) else b""
        return id(value), value.dtype.str, value.shape, value.strides, value.flags.writeable, value.tobytes(), mask
    if type(value).__module__.startswith("array_api_strict._array"):
        return id(value), picture(np.asarray(value))[1:]
    if isinstance(value, Mapping):
        return id(value), [(key, picture(item, seen)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return id(value), [picture(item, seen) for item in value]
    if isinstance(value, an.Module) and id(value) not in seen:
        return id(value), picture(vars(value), seen | {id(value)})
    return (id(value), repr(value)) if isinstance(value, int | float | complex | str | bytes) else id(value)


def assert_documented(error: BaseException, refused: tuple[type[Exception], ...], speaker: str, argument: str) -> None:
    """The error is of the documented type, worded by the package, and names function, argument, rule and value."""
    assert type(error) in refused, f"{type(error).__name__} instead of {[kind.__name__ for kind in refused]}: {error}"
    assert _is_raised_by_the_package(error.__traceback__), f"raised by a library beneath: {error!r}"
    message = str(error)
    ours = rf"({speaker}): .*\b({argument})\b.* ((must|is supported) .*\bgot\b|must not overlap)"
    if not any(re.fullmatch(text, message) for text in ESTABLISHED):
        assert re.match(ours, message, re.DOTALL), f"not of the form 'function: argument must ..., got ...': {message}"


def _is_raised_by_the_package(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame stands at a raise statement of the package, not at a call that failed."""
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    statement = dis.opname[code.co_code[traceback.tb_lasti]]
    return PACKAGE in Path(code.co_filename).parents and statement == "RAISE_VARARGS"


def assert_refused(
    function: Any,
    arguments: Mapping[str, Any],
    refused: tuple[type[Exception], ...],
    speaker: str,
    argument: str,
    untouched: Any = None,
) -> None:
    """The call raises the documented error, and leaves its arguments and `untouched` byte by byte as they were."""
    held = [arguments, untouched]
    before = picture(held)
    try:
        function(**arguments)
    except Exception as error:
        assert_documented(error, refused, speaker, argument)
    else:
        raise AssertionError(f"accepted, instead of {' or '.join(kind.__name__ for kind in refused)}")
    assert picture(held) == before, "an argument or the layer has changed"


@contextmanager
def noted(complaints: list[str], case: str) -> Iterator[None]:
    """Note what goes wrong in the body, so that one test can try many cases and name all that fail."""
    try:
        yield
    except Exception as error:
        complaints.append(f"{case}: {'' if isinstance(error, AssertionError) else repr(error)}{error}")


def leaves(result: Any, path: str = "result") -> Iterator[tuple[str, Any]]:
    """Every array in a result, with its place; but not the caller's own that a cache refers to."""
    if isinstance(result, tuple):
        names = getattr(result, "_fields", range(len(result)))
        for name, item in zip(names, result, strict=True):
            if name in ("x", "weight", "bias"):
                continue
            yield from leaves(item, f"{path}.{name}")
    elif hasattr(result, "shape"):
        yield path, result


def assert_same_answer(result: Any, expected: Any) -> None:
    """Equal arrays in the same places, up to the order of additions."""
    found, wanted = dict(leaves(result)), dict(leaves(expected))
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        a, b = to_numpy(found[path]), to_numpy(value)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        # At most 40 numbers are added, in an order that depends on the layout: 40 * 2.2e-16 of the largest, with room.
        scale = float(np.max(np.abs(np.where(np.isfinite(b), b, 0)), initial=0.0))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * scale, err_msg=path)
