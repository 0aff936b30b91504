"""The examples in the docstrings of arraynorm.testing run."""

from __future__ import annotations

import doctest

import pytest

import arraynorm.testing


@pytest.mark.parametrize("name", ["check_vjp", "gradcheck", "run_ranks"])
def test_the_examples_in_the_docstring_run(name: str) -> None:
    (examples,) = doctest.DocTestFinder().find(getattr(arraynorm.testing, name), name, globs={})
    results = doctest.DocTestRunner().run(examples)
    assert results.attempted > 0
    assert results.failed == 0


def test_the_public_names_are_those_of_the_documentation() -> None:
    assert sorted(arraynorm.testing.__all__) == ["GradientError", "KinkWarning", "check_vjp", "gradcheck", "run_ranks"]
    assert all(getattr(arraynorm.testing, name).__doc__ for name in arraynorm.testing.__all__)
