"""`dense-lab train`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from dense_lab.cli import options

if TYPE_CHECKING:
    from dense_lab.space import Study
    from dense_lab.training import Evaluation


@click.command("train")
@options.study_argument
@options.overrides
@options.device
@options.allow_unverified
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the run [runs/NAME/single].")
@options.runs
@options.as_json
def command(
    study: Path,
    overrides: tuple[str, ...],
    device: str,
    allow: Literal["verified", "unverified"],
    out: Path | None,
    runs: Path,
    as_json: bool,
) -> None:
    """Train the one run that STUDY.yaml describes; run it again to go on after an interruption.

    Open values must be closed with --set. Use `search` for studies.
    """
    loaded = options.load_study(study, overrides, runs)
    _check_single(study, loaded)
    spec = loaded.point({})
    from dense_lab.runs import SINGLE, sign
    from dense_lab.search import data
    from dense_lab.study import plugins_used
    from dense_lab.training import train

    folder = out or runs / loaded.name / SINGLE
    if not (folder / "spec.json").exists():
        # Before anything is written: what the user then corrects would be another run.
        data.prepare(loaded)
    options.look_at_outsiders(loaded)
    options.judge_kernels([spec], device, allow)
    if not as_json:
        options.console().print(f"training {spec.digest()} into {folder}")
    sign(folder, spec.digest(plugins_used(spec, loaded.registry)))
    result = train(spec, folder, device=device, on_evaluation=None if as_json else partial(_tell, spec.train.tokens))
    if as_json:
        options.print_json({"folder": str(folder), "metrics": result.metrics, "tags": result.tags})
        return
    rows = ((name, f"{value:.6g}") for name, value in sorted(result.metrics.items()))
    options.print_table(f"{loaded.name} on {result.tags['device']}", ("metric", "value"), rows, right=("value",))


def _tell(budget: int, evaluation: Evaluation) -> None:
    from dense_lab.units import human

    loss, speed = evaluation.metrics["valid/loss"], evaluation.metrics.get("tokens_per_second", 0.0)
    done = f"{human(evaluation.tokens)} of {human(budget)} tokens"
    options.console().print(f"step {evaluation.step:>6}  {done}  valid/loss {loss:.4f}  {human(speed)} tokens/s")


def _check_single(path: Path, study: Study) -> None:
    from dense_lab.errors import InputError

    if study.ablation:
        raise InputError(f"{path} is an ablation of {len(study.arms())} arms: `dense-lab search` trains its cells")
    if study.space:
        paths = ", ".join(parameter.path for parameter in study.space)
        raise InputError(f"{path} leaves these open: {paths}. Close them with --set PATH=VALUE, or use `search`")
