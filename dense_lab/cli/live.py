"""The live display of a search: what is done, what runs and how well, the best so far, the time left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dense_lab.results import TrialView
from dense_lab.units import human

if TYPE_CHECKING:
    from dense_lab.search import Progress
    from dense_lab.search.progress import ArmProgress


class Display:
    """Redraws in place on a terminal; elsewhere prints a line for each trial that ends."""

    def __init__(self, console: Console, metric: str):
        self.console, self.metric = console, metric
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._told = -1

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, progress: Progress) -> None:
        """Show a snapshot."""
        if self._live:
            self._live.update(self._picture(progress))
        elif progress.finished != self._told:
            self._told = progress.finished
            self.console.print(self._line(progress))

    def _line(self, progress: Progress) -> str:
        parts = [f"{progress.finished}/{progress.total} trials"]
        parts += [f"{progress.pruned} pruned"] * bool(progress.pruned) + [f"{progress.failed} failed"] * bool(
            progress.failed
        )
        if progress.best and not progress.arms:
            parts.append(f"best {self.metric} {progress.best.metrics[self.metric]:.4f} (trial {progress.best.number})")
        if progress.seconds_left:
            parts.append(f"{duration(progress.seconds_left)} left")
        return ", ".join(parts)

    def _picture(self, progress: Progress) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        head.add_row(
            ProgressBar(total=max(1, progress.total), completed=progress.finished, width=32), self._line(progress)
        )
        table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
        for column in ("trial", "done", "loss", "tokens/s", "what"):
            table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True, overflow="ellipsis")
        for one in progress.running:
            table.add_row(
                str(one.trial.number),
                "" if one.fraction is None else f"{one.fraction:.0%}",
                "" if one.loss is None else f"{one.loss:.3f}",
                "" if one.tokens_per_second is None else human(one.tokens_per_second),
                short(one.trial),
            )
        if progress.arms:
            return Group(head, arms_table(progress.arms, progress.metric, most=max(4, self.console.height - 12)), table)
        best = Text(
            f"best: {short(progress.best)}" if progress.best else "", style="green", overflow="ellipsis", no_wrap=True
        )
        return Group(head, table, best)


def arms_table(arms: Sequence[ArmProgress], metric: str, most: int = 1000) -> Table:
    """The arms of an ablation with their cells and their mean so far; of more than `most` those at work."""
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    tuned = [path for arm in arms[:1] for path in arm.tuned] or sorted({path for arm in arms for path in arm.tuned})
    table.add_column("arm", no_wrap=True, overflow="ellipsis")
    for column in ("cells", f"mean {metric}", *(path.removeprefix("train.") for path in tuned)):
        table.add_column(column, justify="right", no_wrap=True)
    busy = [arm for arm in arms if arm.done + arm.failed < arm.cells]
    shown = arms if len(arms) <= most else (busy or list(arms))[:most]
    for arm in shown:
        failed = f", {arm.failed} failed" if arm.failed else ""
        mean = "" if arm.mean is None else f"{arm.mean:.4f}"
        values = (f"{arm.tuned[path]:g}" if path in arm.tuned else "" for path in tuned)
        table.add_row(arm.name, f"{arm.done}/{arm.cells}{failed}", mean, *values)
    if len(shown) < len(arms):
        table.add_row(f"and {len(arms) - len(shown)} others")
    return table


def short(trial: TrialView) -> str:
    """A trial in one line: its arm and seed, or `retnet heads=4, densessm span=2 gate=mlp, lr=0.0077`."""
    if trial.label and trial.role:
        rest = {path: value for path, value in trial.params.items() if path != "arm"}
        return ", ".join(filter(None, (trial.label, "tuning" if trial.role == "tune" else "", brief(rest))))
    return trial.label or brief(trial.params)


def brief(params: Mapping[str, object]) -> str:
    """Parameters in one line; what belongs to a component follows its name."""
    words: dict[str, list[str]] = {}
    for path, value in params.items():
        owner = next((known for known in words if path.startswith(f"{known}.")), path)
        word = (
            _value(value)
            if path.count(".") == 1 and path.startswith("model.")
            else f"{path.split('.')[-1]}={_value(value)}"
        )
        words.setdefault(owner, []).append(word)
    return ", ".join(" ".join(group) for group in words.values())


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
