"""Module: a tree of layers with parameters, buffers, gradients, hooks and a state_dict.

The surface is torch's `nn.Module` as far as it makes sense without a tape: parameters and buffers are plain arrays,
gradients are kept beside them, and `backward` is a method.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Self, TypeVar

from arraynorm import _array, _check
from arraynorm.layers import _state
from arraynorm.layers._hooks import HookHandle
from arraynorm.layers.no_grad import grad_enabled
from arraynorm.typing import Array, NamedGradient

M = TypeVar("M", bound="Module")

ForwardPreHook = Callable[["Module", tuple[Any, ...]], Any]
ForwardHook = Callable[["Module", tuple[Any, ...], Any], Any]

_STORES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Module:
    """Base class of all layers, and of your own: register parameters, write `forward` and `backward`.

    A subclass calls `super().__init__()` first. `forward` keeps what `backward` needs with `self.keep(cache)`;
    `backward(dy)` returns dx and adds to the parameters' gradients with `self.accumulate_gradient(name, value)`.
    Assigning a Module to an attribute makes it a child.
    """

    _version: int = 1
    """Version of the state_dict's layout, carried in its metadata."""

    training: bool

    def __init__(self) -> None:
        # past __setattr__, which looks into these
        self.__dict__.update(
            training=True,
            _parameters={},
            _buffers={},
            _transient=set(),
            _modules={},
            grads={},
            _requires_grad=True,
            _forward_hooks={},
            _forward_pre_hooks={},
            _cache=None,
        )

    # -- attributes ------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in _STORES:
            raise AttributeError(f"{type(self).__name__}: call super().__init__() before anything is assigned")
        for store in _STORES:
            entries = self.__dict__.get(store, {})
            if name in entries:
                return entries[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        store = next((s for s in (self._parameters, self._buffers) if name in s), None)
        if store is not None:
            store[name] = value
        elif isinstance(value, Module) or name in self._modules:
            if name in self.__dict__ and self.__dict__[name] is None:
                del self.__dict__[name]  # self.child = None, until it is known
            self.add_module(name, value)
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        for store in (self._parameters, self._buffers, self._modules):
            if name in store:
                del store[name]
                self.grads.pop(name, None)
                self._transient.discard(name)
                return
        object.__delattr__(self, name)

    def register_parameter(self, name: str, array: Array | None) -> None:
        """Make `array` (or None) the parameter `name`; its gradient stands in `grads[name]`."""
        self._check_new_name(name)
        self._parameters[name] = array
        self.grads[name] = None

    def register_buffer(self, name: str, array: Array | None, persistent: bool = True) -> None:
        """Make `array` (or None) the buffer `name`; one that is not persistent stays out of state_dict."""
        self._check_new_name(name)
        self._buffers[name] = array
        if not persistent:
            self._transient.add(name)

    def add_module(self, name: str, module: Module | None) -> None:
        """Make `module` (or None) the child `name`."""
        if module is not None and not isinstance(module, Module):
            raise TypeError(f"add_module: {name} must be a Module or None, got {type(module).__qualname__}")
        if name not in self._modules:
            self._check_new_name(name)
        self._modules[name] = module

    def _check_new_name(self, name: str) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"{type(self).__name__}: a name must be a non-empty string without a dot, got {name!r}")
        if name in self._parameters or name in self._buffers or name in self._modules or hasattr(self, name):
            raise ValueError(f"{type(self).__name__}: attribute {name!r} exists already")

    # -- calling ---------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, with the hooks around it."""
        for pre_hook in tuple(self._forward_pre_hooks.values()):
            changed = pre_hook(self, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        y = self.forward(*args, **kwargs)
        for hook in tuple(self._forward_hooks.values()):
            changed = hook(self, args, y)
            y = y if changed is None else changed
        return y

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """To be written by the subclass."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, dy: Array) -> Any:
        """To be written by the subclass: dx from dy, and the parameters' gradients into `grads`."""
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def register_forward_pre_hook(self, hook: ForwardPreHook) -> HookHandle:
        """Call `hook(module, args)` before forward; what it returns, if anything, replaces the arguments."""
        return HookHandle(self._forward_pre_hooks, hook)

    def register_forward_hook(self, hook: ForwardHook) -> HookHandle:
        """Call `hook(module, args, output)` after forward; what it returns, if anything, replaces the output."""
        return HookHandle(self._forward_hooks, hook)

    # -- caches and gradients --------------------------------------------------------------------------------

    def keep(self, cache: Any) -> None:
        """Keep what backward needs, unless under `no_grad` (where a call in eval writes no attribute at all)."""
        if grad_enabled():
            self._cache = cache
        elif self.training:
            self._cache = None  # of an earlier forward, which is not the last any more

    def kept(self) -> Any:
        """The cache of the last forward; RuntimeError where there is none.

        It stays until `clear_cache`, which a backward calls once it has succeeded: a second one is then refused.
        """
        if self._cache is None:
            raise RuntimeError(
                f"{type(self).__name__}: backward needs a forward before it, outside no_grad, and takes its cache: "
                "call it once per forward (a layer used twice in one pass goes through the functional API)"
            )
        return self._cache

    def clear_cache(self) -> None:
        """Drop the caches of this module and of all below it."""
        for module in self.modules():
            module._cache = None

    def accumulate_gradient(self, name: str, gradient: Array | None) -> None:
        """Add `gradient` to `grads[name]`; nothing where it is None or after `requires_grad_(False)`.

        The gradient has the parameter's shape; the first one is copied.
        """
        parameter = self._parameters.get(name)
        if parameter is None or gradient is None or not self._requires_grad:
            if name not in self._parameters:
                raise ValueError(f"{type(self).__name__}: name must be a parameter's, got {name!r}")
            return
        _check.companion(type(self).__name__, parameter, f"the gradient of {name}", gradient, tuple(parameter.shape))
        held = self.grads[name]
        if held is None:
            self.grads[name] = _array.array_namespace(gradient).asarray(gradient, copy=True)
        else:
            with _array.silent():
                self.grads[name] = _array.assign(held, held + gradient)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; with `set_to_none=False` fill them with zeros."""
        for module in self.modules():
            for name, gradient in module.grads.items():
                if gradient is not None:
                    module.grads[name] = (
                        None
                        if set_to_none
                        else _array.assign(gradient, _array.array_namespace(gradient).zeros_like(gradient))
                    )

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whether backward computes parameters' gradients; dx does not depend on it."""
        for module in self.modules():
            module._requires_grad = bool(requires_grad)
        return self

    def named_gradients(self, prefix: str = "", recurse: bool = True) -> Iterator[NamedGradient]:
        """(name, parameter, gradient) of every parameter that has a gradient: what an optimizer loops over.

        A parameter that two modules share comes once for each, with the gradient that it got there: the steps add up.
        """
        for path, module in self.named_modules(prefix) if recurse else ((prefix, self),):
            for name, parameter in module._parameters.items():
                gradient = module.grads.get(name)
                if parameter is not None and gradient is not None:
                    yield NamedGradient(f"{path}.{name}" if path else name, parameter, gradient)

    # -- the tree --------------------------------------------------------------------------------------------

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, parents first, each once."""
        seen: set[int] = set()

        def walk(path: str, module: Module) -> Iterator[tuple[str, Module]]:
            if id(module) not in seen:
                seen.add(id(module))
                yield path, module
                for name, child in module.named_children():
                    yield from walk(f"{path}.{name}" if path else name, child)

        return walk(prefix, self)

    def modules(self) -> Iterator[Module]:
        """This module and all below it, as `named_modules`."""
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the children, without those below them."""
        return ((name, child) for name, child in self._modules.items() if child is not None)

    def children(self) -> Iterator[Module]:
        """The children, without those below them."""
        return (child for _, child in self.named_children())

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Array]]:
        """(dotted name, array) of all parameters that are not None, each once; `recurse=False`: this module's."""
        return ((path, array) for path, _, _, array in self._entries("_parameters", prefix, recurse))

    def parameters(self, recurse: bool = True) -> Iterator[Array]:
        """All parameters, as `named_parameters`."""
        return (array for _, array in self.named_parameters(recurse=recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Array]]:
        """(dotted name, array) of all buffers that are not None, each once; `recurse=False`: this module's."""
        return ((path, array) for path, _, _, array in self._entries("_buffers", prefix, recurse))

    def buffers(self, recurse: bool = True) -> Iterator[Array]:
        """All buffers, as `named_buffers`."""
        return (array for _, array in self.named_buffers(recurse=recurse))

    def _entries(self, store: str, prefix: str, recurse: bool) -> Iterator[tuple[str, Module, str, Array]]:
        """(path, owner, name, array) of the arrays in one store; one that stands in two places is named once."""
        seen: set[int] = set()
        for path, module in self.named_modules(prefix) if recurse else ((prefix, self),):
            for name, array in getattr(module, store).items():
                if array is not None and id(array) not in seen:
                    seen.add(id(array))
                    yield f"{path}.{name}" if path else name, module, name, array

    def apply(self, function: Callable[[Module], Any]) -> Self:
        """Call `function` on every child below, then on this module."""
        for child in self.children():
            child.apply(function)
        function(self)
        return self

    def train(self, mode: bool = True) -> Self:
        """Training mode (or eval, for `mode=False`) for this module and all below it; drops their caches."""
        if not isinstance(mode, bool):
            raise ValueError(f"{type(self).__name__}.train: mode must be a bool, got {mode!r}")
        self.training = mode
        self._cache = None
        for child in self.children():
            child.train(mode)  # a subclass may stay in eval
        return self

    def eval(self) -> Self:
        """`train(False)`."""
        return self.train(False)

    # -- where the arrays live -------------------------------------------------------------------------------

    def to(self, xp_or_device: Any = None, dtype: Any = None) -> Self:
        """Move all arrays to another library (a namespace such as cupy) or device, and floating ones to `dtype`."""
        xp = _check.namespace("to", xp_or_device) if isinstance(xp_or_device, ModuleType) else None
        for array in itertools.chain(self.parameters(), self.buffers()):
            library = xp or _array.array_namespace(array)
            _check.floating_dtype("to", library, dtype)
            if xp is None:
                _check.known_device("to", library, xp_or_device)
        if xp is not None:
            self._convert(lambda array, _: _array.move(array, xp))
        elif xp_or_device is not None:
            self._convert(lambda array, _: _array.move(array, _array.array_namespace(array), xp_or_device))
        if dtype is not None:
            self._cast(lambda xp: dtype)
        return self

    def cpu(self) -> Self:
        """Move all arrays to NumPy."""
        import numpy as np

        return self.to(np)

    def cuda(self, device: Any = None) -> Self:
        """Move all arrays to CuPy, on `device`; without one, those that are not there yet to the current device."""
        cupy = _array.cupy()
        with cupy.cuda.Device(device) as place:
            self.to(cupy)
            return self if device is None else self.to(place)

    def half(self) -> Self:
        """Parameters in float16; gradients and floating buffers in float32, where variances do not overflow."""
        return self._cast(lambda xp: xp.float16)

    def float(self) -> Self:
        """Parameters, gradients and floating buffers in float32."""
        return self._cast(lambda xp: xp.float32)

    def double(self) -> Self:
        """Parameters, gradients and floating buffers in float64."""
        return self._cast(lambda xp: xp.float64)

    def _cast(self, dtype_of: Callable[[Any], Any]) -> Self:
        def cast(array: Array, is_parameter: bool) -> Array:
            if not _array.is_floating(array):
                return array
            xp = _array.array_namespace(array)
            dtype = dtype_of(xp)
            return xp.astype(array, dtype if is_parameter else _array.running_dtype(xp, dtype), copy=False)

        return self._convert(cast)

    def _convert(self, function: Callable[[Array, bool], Array]) -> Self:
        """Replace every array by `function(array, is_parameter)`, drop the caches; nothing changes if a call fails."""
        stores = [(m, store) for m in self.modules() for store in (m._parameters, m._buffers, m.grads)]
        done: dict[int, Array] = {}  # an array that stands in two places stays one

        def convert(array: Array | None, is_parameter: bool) -> Array | None:
            if array is not None and id(array) not in done:
                done[id(array)] = function(array, is_parameter)
            return None if array is None else done[id(array)]

        converted = [{k: convert(a, store is m._parameters) for k, a in store.items()} for m, store in stores]
        for (_, store), new in zip(stores, converted, strict=True):
            store.update(new)
        self.clear_cache()
        return self

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self, prefix: str = "") -> OrderedDict[str, Array]:
        """All parameters and persistent buffers by dotted name: the arrays themselves, not copies.

        The versions of the modules' layouts stand in its attribute `_metadata`, as torch has it.
        """
        state: OrderedDict[str, Array] = _state.StateDict()
        for path, module in self._named_paths(prefix.rstrip(".")):
            state._metadata[path] = {"version": module._version}  # type: ignore[attr-defined]
            for name, array in module._persistent():
                state[f"{path}.{name}" if path else name] = array
        return state

    def load_state_dict(self, state_dict: Mapping[str, Array], strict: bool = True) -> _state.IncompatibleKeys:
        """Copy the arrays of `state_dict` into this module's, in place; the mapping is not changed.

        Parameters
        ----------
        state_dict : mapping of str to array
            As `state_dict` returns it, or as torch saved it, with NumPy arrays for tensors. Values are copied between
            libraries and dtypes.
        strict : bool
            Whether missing and unexpected keys are errors.

        Returns
        -------
        IncompatibleKeys
            The missing and the unexpected keys.

        Raises
        ------
        RuntimeError
            One error for all faults of the load; nothing is loaded then.
        """
        return _state.load(self, state_dict, strict)

    def _named_paths(self, prefix: str) -> Iterator[tuple[str, Module]]:
        """Like named_modules, with a shared module under each of its names (a state_dict repeats it, as torch's)."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child._named_paths(f"{prefix}.{name}" if prefix else name)

    def _persistent(self) -> Iterator[tuple[str, Array]]:
        for name, array in itertools.chain(self._parameters.items(), self._buffers.items()):
            if array is not None and name not in self._transient:
                yield name, array

    def _migrate_state(self, state: dict[str, Array], prefix: str, version: int | None, errors: list[str]) -> None:
        """Bring the entries of this module in `state`, saved under layout `version`, to the present layout."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def __copy__(self) -> Self:
        new = self._recreated_as(type(self))
        for hooks in _HOOKS:
            new.__dict__[hooks] = self.__dict__[hooks].copy()
        return new

    def _recreated_as(self, cls: type[M]) -> M:
        """A `cls` with everything that this module has but the cache: the same arrays, in containers of its own.

        The hooks are in the same containers, so that their handles can still remove them.
        """
        new = cls.__new__(cls)
        for name, value in self.__dict__.items():
            new.__dict__[name] = value.copy() if isinstance(value, dict | set) and name not in _HOOKS else value
        new.__dict__["_cache"] = None
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy({**self.__dict__, "_cache": None}, memo))
        return new

    # -- showing ---------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What stands between the brackets of repr."""
        return ""

    def __repr__(self) -> str:
        children = [f"({name}): {child!r}".replace("\n", "\n  ") for name, child in self._modules.items()]
        if not children:
            return f"{type(self).__name__}({self.extra_repr()})"
        lines = [line for line in (self.extra_repr(), *children) if line]
        return "\n  ".join((f"{type(self).__name__}(", *lines)) + "\n)"
