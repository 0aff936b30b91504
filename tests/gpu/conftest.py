"""These tests need a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest

from namespaces import NAMESPACES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, where there is none."""
    if any(namespace.name == "cupy" for namespace in NAMESPACES):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="not run: needs CuPy and a CUDA device (make gpu)"))
