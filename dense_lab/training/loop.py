"""The training loop: a token budget, evaluations on the way, a record of all of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dense_lab import registry as registries
from dense_lab.components import Data
from dense_lab.corpus import Corpus
from dense_lab.counting import check_sizes, count
from dense_lab.errors import InputError, MachineError
from dense_lab.files import last_line
from dense_lab.model import LanguageModel
from dense_lab.outsiders import look
from dense_lab.study import RunSpec, plugins_used
from dense_lab.training import checkpoint, code, provenance
from dense_lab.training.checkpoint import Progress
from dense_lab.training.device import (
    Place,
    choose_place,
    out_of_memory,
    peak_memory_bytes,
    reset_peak_memory,
    use_threads,
)
from dense_lab.training.evaluate import evaluate
from dense_lab.training.graph import build_step
from dense_lab.training.optimizer import build_optimizer
from dense_lab.training.outcome import Evaluation, Pruned, Result, TrialFailed
from dense_lab.training.record import METRICS, Recorder
from dense_lab.training.schedule import learning_rate, plan
from dense_lab.training.step import StepClock, StepOutput

OnEvaluation = Callable[[Evaluation], None]


def train(
    spec: RunSpec,
    folder: Path,
    *,
    device: str = "auto",
    on_evaluation: OnEvaluation | None = None,
    should_stop: Callable[[], bool] | None = None,
    registry: registries.Registry | None = None,
    threads: int | None = None,
) -> Result:
    """Train the run that `spec` describes, record it in `folder`, and go on from its checkpoint if there is one.

    A run that is complete already is not trained again. `on_evaluation` may raise `Pruned`: the result then says so.
    `should_stop` is asked whenever a line of metrics is written; at its True the run is saved, to go on from there to
    the same numbers, and KeyboardInterrupt raised. `threads` are torch's CPU threads.

    Raises InputError (the spec does not fit together, or `folder` holds another run), MachineError (no such device, no
    network), TrialFailed (loss not a number, out of memory, a component raised). A failure is in result.json as well.
    """
    place = choose_place(device, spec.train.precision)
    use_threads(threads)
    registry = registry or registries.default()
    plugins = plugins_used(spec, registry)
    recorder = Recorder(folder)
    recorder.begin(spec, plugins)
    stored = recorder.result()
    if stored is not None and stored.status == "complete":
        return stored
    return _train(spec, plugins, place, recorder, registry, on_evaluation, should_stop)


def _train(
    spec: RunSpec,
    plugins: dict[str, str],
    place: Place,
    recorder: Recorder,
    registry: registries.Registry,
    on_evaluation: OnEvaluation | None,
    should_stop: Callable[[], bool] | None,
) -> Result:
    """Train, and record how it ended."""
    generators = [place.device] if place.device.type == "cuda" else []
    run: Run | None = None
    try:
        # Commands have looked at some points of a search; this may be another.
        look([spec.model], registry)
        with torch.random.fork_rng(devices=generators):
            run = Run(spec, plugins, place, recorder)
            run.train(on_evaluation, should_stop)
            return recorder.end("complete", "", run.metrics(), run.tags())
    except Pruned as error:
        assert run is not None  # Only on_evaluation raises it.
        return recorder.end("pruned", str(error) or "pruned", run.metrics(), run.tags())
    except MachineError:
        raise  # The run is not at fault, and may succeed once the machine has what it lacks.
    # The isolation boundary: whatever a component does, the study goes on and the record says what happened.
    except Exception as error:
        reason = _reason(error, run)
        recorder.end("failed", reason, run.metrics() if run else {}, run.tags() if run else {})
        if isinstance(error, (InputError, TrialFailed)):
            raise
        raise TrialFailed(reason) from error


def _reason(error: Exception, run: Run | None) -> str:
    if isinstance(error, (InputError, TrialFailed)):
        return str(error)
    text = " ".join(str(error).split())
    what = f"out of memory ({text})" if out_of_memory(error) else f"{type(error).__name__}: {text}"
    return f"{what}; {run.last_good()}" if run else what


def prepared(data: Data) -> Corpus:
    """Trials of one study that run in one process share their corpus; one at a time is kept, since they are large."""
    key = f"{type(data).__module__} {data.model_dump_json()}"
    if key not in _corpora:
        _corpora.clear()
        _corpora[key] = data.prepare()
    return _corpora[key]


_corpora: dict[str, Corpus] = {}


class Run:
    """One run in progress."""

    def __init__(self, spec: RunSpec, plugins: dict[str, str], place: Place, recorder: Recorder) -> None:
        self.spec, self.plugins, self.place, self.recorder = spec, plugins, place, recorder
        # Now, and not when it ends: files may have changed by then.
        provenance.commit(), code.release(), code.code(spec)
        self.corpus = prepared(spec.data)
        self.plan = plan(spec.train, self.corpus.seq_len)
        check_sizes(spec.model)
        self.model: LanguageModel = spec.model.build(self.corpus.vocab_size).initialise(spec.seed).to(place.device)
        self.model.kernels = spec.kernels
        self.optimizer = build_optimizer(self.model, spec.train)
        self.step = build_step(self.model, self.optimizer, place, self.plan.micro_size, spec.train.clip)
        torch.manual_seed(spec.seed)  # Dropout alone draws from it; weights and batches have generators of their own.
        self.checkpoint = recorder.folder / "checkpoint"
        self.progress = checkpoint.load(self.checkpoint, self.model, self.optimizer) or Progress()
        recorder.keep_until(self.progress.step)
        reset_peak_memory(place.device)
        self._began = time.perf_counter() - self.progress.seconds

    def train(self, on_evaluation: OnEvaluation | None, should_stop: Callable[[], bool] | None = None) -> None:
        """Train to the end of the budget and test."""
        progress, schedule = self.progress, self.plan
        batches = self.corpus.train_batches(schedule.batch_size, self.spec.seed, skip=progress.step)
        clock = StepClock(self.place.device, schedule.steps - progress.step)
        loss, since = torch.zeros((), device=self.place.device), progress.step
        while progress.step < schedule.steps:
            batch = next(batches)
            progress.batches = provenance.chained(progress.batches, batch)
            lr = learning_rate(self.spec.train, progress.step + 1, schedule.steps)
            output = self.step(batch, lr)
            loss += output.loss
            progress.step += 1
            clock.lap()
            if progress.step in schedule.logs:
                self._look(loss / (progress.step - since), output, lr, clock, on_evaluation)
                if should_stop is not None and progress.step < schedule.steps and should_stop():
                    checkpoint.save(self.checkpoint, self.model, self.optimizer, progress)
                    raise KeyboardInterrupt
                loss.zero_()
                since = progress.step
                clock.restart()
        self._test()

    def _look(
        self, loss: Tensor, output: StepOutput, lr: float, clock: StepClock, on_evaluation: OnEvaluation | None
    ) -> None:
        """Write down and check the training loss; evaluate and save where the plan says so."""
        progress, step = self.progress, self.progress.step
        found = {"train/loss": loss.item(), "train/lr": lr, "train/gradient_norm": output.gradient_norm.item()}
        self._check(found["train/loss"], "train/loss")
        if (seconds := clock.median()) is not None:
            found |= {"tokens_per_second": self.plan.tokens_per_step / seconds, "step_seconds": seconds}
        if step in self.plan.evaluations:
            found |= self._evaluate("valid", self.spec.train.valid_tokens)
            best = progress.metrics.get("valid/loss_best", math.inf)
            found["valid/loss_best"] = min(best, found["valid/loss"])
        progress.metrics |= found
        progress.seconds = time.perf_counter() - self._began
        tokens = step * self.plan.tokens_per_step
        self.recorder.add({"step": step, "tokens": tokens, "seconds": progress.seconds, **found})
        if step in self.plan.checkpoints or step == self.plan.steps:
            checkpoint.save(self.checkpoint, self.model, self.optimizer, progress)
        if step in self.plan.evaluations and on_evaluation is not None:
            on_evaluation(Evaluation(step, tokens, progress.seconds, dict(progress.metrics)))

    def _evaluate(self, split: Literal["valid", "test"], tokens: int) -> dict[str, float]:
        found = evaluate(self.model, self.corpus, split, self.plan.micro_size, tokens, self.place)
        self._check(found[f"{split}/loss"], f"{split}/loss")
        return found

    def _test(self) -> None:
        if self.spec.train.test_tokens and self.corpus.tokens("test") != 0:
            self.progress.metrics |= self._evaluate("test", self.spec.train.test_tokens)
        self.progress.seconds = time.perf_counter() - self._began

    def _check(self, loss: float, name: str) -> None:
        if not math.isfinite(loss):
            raise TrialFailed(
                f"{name} is {loss} at step {self.progress.step} of {self.plan.steps} (lr {self.spec.train.lr:g}); "
                f"{self.last_good()}"
            )

    def last_good(self) -> str:
        """The last step known to be sound, in words."""
        line = last_line(self.recorder.folder / METRICS)
        return f"last good step {line['step']}, train/loss {line['train/loss']:.4g}" if line else "no good step before"

    def metrics(self) -> dict[str, float]:
        """Final values of everything measured, sizes of the model included."""
        sizes = count(self.spec.model, self.corpus.vocab_size)._asdict()
        memory = {"peak_memory_bytes": peak_memory_bytes(self.place.device)}
        return {**self.progress.metrics, **sizes, **memory, "seconds": self.progress.seconds}

    def tags(self) -> dict[str, str]:
        """See `provenance.tags`."""
        known = provenance.tags(self.spec, self.plugins, self.corpus, self.model, self.place)
        return known | {"batches": self.progress.batches, "step": self.step.mode}
