"""A pytest plugin (`-p outcomes`) for tests/plant.py: which behaviours each test shows, and whether it failed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

_behaviours: dict[str, list[int]] = {}
_failed: list[str] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        numbers = {number for mark in item.iter_markers("behaviour") for number in mark.args}
        _behaviours[item.nodeid] = sorted(numbers)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _failed.append(report.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.append(report.nodeid)


def pytest_sessionfinish() -> None:
    import arraynorm

    outcomes = {"package": arraynorm.__file__, "behaviours": _behaviours, "failed": _failed}
    Path(os.environ["ARRAYNORM_OUTCOMES"]).write_text(json.dumps(outcomes))
