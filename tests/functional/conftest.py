"""The functional ops on every array library, and on every kernel that runs on NumPy's arrays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from namespaces import EVERY_PATH, Namespace


@pytest.fixture(params=EVERY_PATH, ids=lambda namespace: namespace.name)
def xp(request: pytest.FixtureRequest) -> Namespace:
    """Each array library in turn."""
    namespace: Namespace = request.param
    return namespace


@pytest.fixture(autouse=True)
def _on_its_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test for one array library runs on the kernels of that entry; one that names none, on NumPy's fast ones.

    A call that these decline raises, so that no test of them can be one of the reference.
    """
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    namespace: Namespace = parameters.get("xp", EVERY_PATH[0])
    with namespace.its_kernels():
        yield
