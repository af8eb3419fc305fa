"""dense-lab: architecture search and ablation of dense hidden connections in state-space language models."""

__version__ = "0.1.0"
