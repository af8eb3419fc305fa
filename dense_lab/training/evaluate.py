"""Loss and accuracy on validation and test text. Letters: B batch, T tokens, V vocabulary."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from dense_lab.corpus import IGNORED, Corpus
from dense_lab.model import LanguageModel
from dense_lab.training.device import Place


def evaluate(
    model: LanguageModel, corpus: Corpus, split: Literal["valid", "test"], batch_size: int, tokens: int, place: Place
) -> dict[str, float]:
    """`<split>/loss`, nats per scored position, and `<split>/accuracy` where the corpus asks for it.

    The accuracy is the mean over examples of each example's mean over its scored positions (zoology's metric). Where
    the corpus names the tasks of its batches there is a `<split>/accuracy_<task>` of each. Nothing to score is nan.
    """
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=place.device)
    scored, right = 0, dict[str, list[Tensor]]()
    with torch.no_grad():
        for batch in corpus.eval_batches(split, batch_size, tokens):
            count = int((batch.targets != IGNORED).sum())
            scored, task = scored + count, corpus.task(batch)
            batch = place.send(batch)
            with place.autocast():
                if corpus.scores_accuracy:
                    logits = model(batch.inputs).float()
                    loss += nn.functional.cross_entropy(
                        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
                    )
                    right.setdefault(task, []).append(example_accuracy(logits, batch.targets))
                else:
                    loss += model.loss(batch.inputs, batch.targets).double() * count
    model.train()
    found = {f"{split}/loss": loss.item() / scored if scored else math.nan}
    if corpus.scores_accuracy:
        shares = {task: torch.cat(parts).double() for task, parts in right.items()}
        found[f"{split}/accuracy"] = torch.cat(list(shares.values())).mean().item() if shares else math.nan
        # No slash: MLflow's stores of files keep a metric as a file, which cannot be the folder of others as well.
        found |= {f"{split}/accuracy_{task}": share.mean().item() for task, share in shares.items() if task}
    return found


def example_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """[B] share of the scored positions at which the largest of the logits [B, T, V] is the target [B, T]."""
    scored = targets != IGNORED
    right = (logits.argmax(-1) == targets) & scored
    return right.sum(1) / scored.sum(1)
