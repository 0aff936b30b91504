"""Fixtures and settings of the whole suite."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import arraynorm
from namespaces import NAMESPACES, Namespace

# `make test` is about the package that users get: the checkout's must not come first on the path.
if os.environ.get("ARRAYNORM_TEST_INSTALLED") and not Path(arraynorm.__file__).is_relative_to(sys.prefix):
    raise pytest.UsageError(f"the tests are to run against the installed package, not {arraynorm.__file__}")

# One machine's suite is every machine's suite; HYPOTHESIS_PROFILE=wide draws anew, and more.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=50, database=None)
settings.register_profile(
    "wide", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.fixture(params=NAMESPACES, ids=lambda namespace: namespace.name)
def xp(request: pytest.FixtureRequest) -> Namespace:
    """Each array library in turn."""
    namespace: Namespace = request.param
    return namespace


def pytest_report_header() -> list[str]:
    """What runs, and what does not run here, with the reason."""
    names = ", ".join(namespace.name for namespace in NAMESPACES)
    lines = [f"arraynorm {arraynorm.__version__} in {Path(arraynorm.__file__).parent}", f"array libraries: {names}"]
    if not any(namespace.name == "cupy" for namespace in NAMESPACES):
        lines.append("not run: the cupy namespace, since CuPy or a CUDA device is missing here")
    return lines
