"""Operations of state-space language models: one folder each, a readable reference, fast implementations beside it.

Every operation takes and returns its recurrent state explicitly and accepts `impl=`; see `_dispatch` for who runs when.
"""

from dense_lab_kernels._ahead import compiling_ahead
from dense_lab_kernels._dispatch import (
    ImplementationError,
    implementations,
    recording,
    rehearsing,
    reusing_states,
    using,
    watching,
)
from dense_lab_kernels.add_rms_norm import add_rms_norm
from dense_lab_kernels.causal_conv1d import causal_conv1d
from dense_lab_kernels.decay_attention import decay_attention
from dense_lab_kernels.dense_fuse import dense_fuse
from dense_lab_kernels.linear_cross_entropy import linear_cross_entropy
from dense_lab_kernels.rms_norm import rms_norm
from dense_lab_kernels.rotate import rotate
from dense_lab_kernels.selective_scan import selective_scan
from dense_lab_kernels.tuning import keep, tune
from dense_lab_kernels.verify import fingerprint, judge

OPERATIONS = (
    "add_rms_norm",
    "causal_conv1d",
    "decay_attention",
    "dense_fuse",
    "linear_cross_entropy",
    "rms_norm",
    "rotate",
    "selective_scan",
)
"""Names of the operations whose implementation can be chosen."""

__all__ = [
    "OPERATIONS",
    "ImplementationError",
    "add_rms_norm",
    "causal_conv1d",
    "compiling_ahead",
    "decay_attention",
    "dense_fuse",
    "fingerprint",
    "implementations",
    "judge",
    "keep",
    "linear_cross_entropy",
    "recording",
    "rehearsing",
    "reusing_states",
    "rms_norm",
    "rotate",
    "selective_scan",
    "tune",
    "using",
    "watching",
]
