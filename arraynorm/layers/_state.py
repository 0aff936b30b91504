"""Loading a state_dict: every fault collected first, then everything copied."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from arraynorm import _array, _check
from arraynorm.typing import Array

if TYPE_CHECKING:
    from arraynorm.layers.module import Module


class StateDict(OrderedDict[str, Array]):
    """An ordered dict with the modules' layout versions beside it, under the attribute name that torch uses."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._metadata: dict[str, dict[str, int]] = {}


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict(strict=False)` passed over."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load(root: Module, state_dict: Mapping[str, Array], strict: bool) -> IncompatibleKeys:
    """See `Module.load_state_dict`."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_state_dict: state_dict must be a mapping, got {type(state_dict).__qualname__}")
    state = dict(state_dict)
    metadata: Mapping[str, Mapping[str, int]] = getattr(state_dict, "_metadata", None) or {}
    errors: list[str] = []
    missing: list[str] = []
    planned: list[tuple[Module, str, Array]] = []
    expected: set[str] = set()
    for path, module in root._named_paths(""):
        prefix = f"{path}." if path else ""
        module._migrate_state(state, prefix, metadata.get(path, {}).get("version"), errors)
        for name, target in module._persistent():
            key = prefix + name
            expected.add(key)
            if key not in state:
                missing.append(key)
                continue
            fault, value = _fitted(key, state[key], target)
            errors.extend([fault] if fault else [])
            planned.append((module, name, value))
    unexpected = [key for key in state if key not in expected]
    if strict and unexpected:
        errors.insert(0, f"Unexpected key(s) in state_dict: {quoted(unexpected)}. ")
    if strict and missing:
        errors.insert(0, f"Missing key(s) in state_dict: {quoted(missing)}. ")
    if errors:
        faults = "\n\t".join(errors)
        raise RuntimeError(f"Error(s) in loading state_dict for {type(root).__name__}:\n\t{faults}")
    for module, name, value in planned:
        setattr(module, name, _array.assign(getattr(module, name), value))
    return IncompatibleKeys(missing, unexpected)


def _fitted(key: str, value: Any, target: Array) -> tuple[str | None, Array]:
    """A fault or None, and a copy of `value` in target's library: it may be another array of the same module."""
    value = _array.as_saved(value, target)
    try:
        _check.array("load_state_dict", f"the layer's {key}", target)
        _check.array("load_state_dict", key, value)
    except TypeError as error:
        return f"{error}. ", None
    if tuple(value.shape) != tuple(target.shape):
        return (
            f"size mismatch for {key}: copying a param with shape {tuple(value.shape)} from checkpoint, "
            f"the shape in current model is {tuple(target.shape)}.",
            None,
        )
    if not _array.is_real(value):
        return f"load_state_dict: {key} must hold real numbers, got dtype {value.dtype}. ", None
    if _array.is_integer(target) and not _array.holds_integers(value, target.dtype):
        return f"load_state_dict: {key} must hold integers within {target.dtype}, got {value}. ", None
    xp = _array.array_namespace(target)
    return None, xp.asarray(_array.move(value, xp, _array.device(target)), copy=True)


def quoted(keys: list[str], separator: str = ", ") -> str:
    """'"weight", "bias"'."""
    return separator.join(f'"{key}"' for key in keys)
