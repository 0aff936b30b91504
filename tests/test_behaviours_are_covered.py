"""Every behaviour of the contract is named by a test and has a planted violation that fits the package as it is.

tests/plant.py plants them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import arraynorm
from plant import marked_files
from violations import VIOLATIONS, Violation

BEHAVIOURS = range(1, 47)
PACKAGE = Path(arraynorm.__file__).parent


@pytest.mark.parametrize("number", BEHAVIOURS)
def test_every_behaviour_is_named_by_a_test_and_has_a_violation(number: int) -> None:
    assert any(number in numbers for numbers in marked_files().values())
    assert any(violation.number == number for violation in VIOLATIONS)


def test_no_other_number_is_named() -> None:
    numbers = set().union(*marked_files().values(), {violation.number for violation in VIOLATIONS})
    assert numbers == set(BEHAVIOURS)


@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda violation: f"{violation.number}: {violation.what}")
def test_every_violation_fits_the_package(violation: Violation) -> None:
    assert (PACKAGE / violation.file).read_text().count(violation.old) == 1
    assert violation.new != violation.old


def test_every_violation_is_another_one() -> None:
    counts = Counter((violation.file, violation.old, violation.new) for violation in VIOLATIONS)
    assert max(counts.values()) == 1
