"""`dense-lab init`."""

from __future__ import annotations

from pathlib import Path

import click

from dense_lab.cli import options

TEMPLATE = """\
# A study: which core, and which dense connection, at this budget?
# `dense-lab check {name}.yaml` says whether it is valid, `dense-lab show {name}.yaml` what it means.
dense_lab: 1
name: {name}

data: {{kind: python_source, seq_len: 256}}    # or {{kind: text, path: my.txt}}; see `dense-lab components data`

model:
  width: 128
  depth: 4
  core:
    choice:                                  # an open value: the search chooses
      - {{kind: retnet, heads: {{choice: [2, 4]}}}}
      - {{kind: mamba, state: 16}}
  dense:
    choice:
      - none                                 # the plain core: what every dense connection is compared with
      - kind: densessm
        span: {{int: [1, 2]}}
        transition: {{projection: {{choice: [identity, linear]}}, gate: {{choice: [linear, mlp]}}}}
        fusion: {{choice: [add, attention]}}

train: {{tokens: 500k, batch_tokens: 2k, lr: {{float: [1e-3, 1e-2], log: true}}}}
search: {{sampler: tpe, trials: 20, objective: {{minimize: valid/loss}}}}
"""


@click.command("init")
@click.argument("path", type=click.Path(path_type=Path), default=Path("study.yaml"))
def command(path: Path) -> None:
    """Write a commented study to PATH (study.yaml) to start from."""
    from dense_lab.errors import InputError

    if path.exists():
        raise InputError(f"{path} exists already: name another file")
    if path.suffix not in {".yaml", ".yml"}:
        raise InputError(f"{path}: a study is a YAML file; name it {path}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TEMPLATE.format(name=path.stem))
    options.console().print(f"wrote {path}; now: dense-lab show {path}, then dense-lab search {path}")
