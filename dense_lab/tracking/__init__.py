"""Records of a study in other systems. The files in the study's folder come first; these are projections of them."""

from dense_lab.tracking.mlflow_store import Sent, sync

__all__ = ["Sent", "sync"]
