"""Hooks around a module's forward."""

from __future__ import annotations

import itertools
from typing import Any

_hook_numbers = itertools.count()


class HookHandle:
    """What registering a hook returns; `remove()` takes the hook away again."""

    def __init__(self, hooks: dict[int, Any], hook: Any) -> None:
        # an unpickled module brings hooks numbered by another process
        self._hooks, self._number = hooks, next(n for n in _hook_numbers if n not in hooks)
        hooks[self._number] = hook

    def remove(self) -> None:
        self._hooks.pop(self._number, None)
