"""Training of one run: the loop, what it writes, and how it ends. Imports torch."""

from dense_lab.training.loop import train
from dense_lab.training.outcome import Evaluation, Pruned, Result, TrialFailed

__all__ = ["Evaluation", "Pruned", "Result", "TrialFailed", "train"]
