"""The size that a study brings every architecture to."""

from __future__ import annotations

from typing import Literal

from dense_lab.components import Spec
from dense_lab.units import Count, Fraction


class BudgetSpec(Spec):
    """A size that every arm is brought to, so that architectures are compared and not sizes."""

    params: Count
    """Parameters that each model should have."""
    count: Literal["non_embedding", "all"] = "non_embedding"
    """What is counted: everything but the embedding and an untied head, so that vocabulary and width do not blur the
    comparison (Kaplan et al. 2020, section 2.1), or everything."""
    tolerance: Fraction = 0.05
    """Largest relative difference; a core whose width comes in multiples of s cannot do better than about s / width."""
    solve: Literal["width"] = "width"
    """What is chosen to meet the budget: `model.width`, which a study with a budget leaves out."""
