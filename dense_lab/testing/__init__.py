"""The conformance kit: one test class per slot. Inherit, give the `component` fixture, and pytest says what is wrong.

    class TestMyCore(CoreTests):
        @pytest.fixture
        def component(self):
            return MyCore(heads=2)

Built-in components pass the same tests. All run on a CPU in fp64; tolerances are a few hundred roundings of it.
"""

from __future__ import annotations

from dense_lab.probing import ROUNDING, leaks, random, relative_difference, seeded, tensors
from dense_lab.testing.component import WIDTH, ComponentTests
from dense_lab.testing.core import CoreTests
from dense_lab.testing.data import DataTests, TokenizerTests
from dense_lab.testing.layer import (
    FFNTests,
    FusionTests,
    GateTests,
    PatternTests,
    ProjectionTests,
    TransitionTests,
    assert_per_token,
)

__all__ = [
    "ROUNDING",
    "WIDTH",
    "ComponentTests",
    "CoreTests",
    "DataTests",
    "FFNTests",
    "FusionTests",
    "GateTests",
    "PatternTests",
    "ProjectionTests",
    "TokenizerTests",
    "TransitionTests",
    "assert_per_token",
    "leaks",
    "random",
    "relative_difference",
    "seeded",
    "tensors",
]
