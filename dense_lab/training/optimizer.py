"""AdamW with two groups of parameters: those that weight decay acts on, and the others."""

from __future__ import annotations

import torch
from torch import nn

from dense_lab.modules import CoreModule
from dense_lab.study import TrainSpec


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone: embeddings (a tied head included), everything with
    fewer than two dimensions (norms, biases), and what a core declares (Mamba's A and D)."""
    names = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, nn.Embedding):
            names.add(f"{dot}weight")
        if isinstance(module, CoreModule):
            names |= {dot + name for name in module.undecayed()}
    return names


def build_optimizer(model: nn.Module, spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), in one fused kernel per step where torch has one."""
    excepted = undecayed(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if name not in excepted], "weight_decay": spec.weight_decay},
        {"params": [p for name, p in named if name in excepted], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=(spec.beta1, spec.beta2), fused=True)
