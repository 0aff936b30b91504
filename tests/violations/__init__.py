"""Planted violations of the contract, as data for tests/plant.py.

Where several behaviours share a line of code, an edit breaks one clause of one of them.
"""

from violations._a_to_d import A_TO_D
from violations._e_to_k import E_TO_K
from violations._violation import Violation

VIOLATIONS = [*A_TO_D, *E_TO_K]

__all__ = ["VIOLATIONS", "Violation"]
