"""The search: Optuna proposes trials, worker processes train them, the parent supervises, records and shows."""

from dense_lab.search.engine import Outcome, search
from dense_lab.search.progress import Progress, Running

__all__ = ["Outcome", "Progress", "Running", "search"]
