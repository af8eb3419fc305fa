"""What the seeds of a study allow to be said: comparisons, verdicts, power, and when to stop adding seeds.

numpy and scipy only; reads no files. docs/STATISTICS.md says what is computed, from which sources, and its limits.
"""

from dense_lab.statistics.comparison import ArmVerdict, Comparison, Direction, Verdict, compare
from dense_lab.statistics.corrections import Correction
from dense_lab.statistics.power import detectable, seeds_needed, upper_deviation
from dense_lab.statistics.sequential import compare_at_look, undecided

__all__ = [
    "ArmVerdict",
    "Comparison",
    "Correction",
    "Direction",
    "Verdict",
    "compare",
    "compare_at_look",
    "detectable",
    "seeds_needed",
    "undecided",
    "upper_deviation",
]
