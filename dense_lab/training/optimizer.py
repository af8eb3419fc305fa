"""AdamW with two groups of parameters: those that weight decay acts on, and the others."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

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


class AdamW(torch.optim.Optimizer):
    """torch's AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in its fused form, with equal results and state.

    torch's own class imports torch._dynamo at its first use, which takes two to five seconds of every training run.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch."""
        # Without the wrapper that does the import.
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let the gradients go."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self._state_of(p) for p in params]
            firsts, seconds, steps = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                firsts,
                seconds,
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Both moments [like the parameter] and the number of steps [], on its device."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def build_optimizer(model: nn.Module, spec: TrainSpec) -> AdamW:
    """AdamW in one fused kernel per group and step."""
    excepted = undecayed(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if name not in excepted], "weight_decay": spec.weight_decay},
        {"params": [p for name, p in named if name in excepted], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=spec.lr, betas=(spec.beta1, spec.beta2))
