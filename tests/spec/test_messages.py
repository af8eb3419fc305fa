"""What is said about a study that is wrong: the place, the path, what was expected, what was found, what would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.spec.studies import complaint, of


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {core: retnt}", "x.yaml:2:15 model.core: no core named 'retnt'. Did you mean 'retnet'? Installed: "),
        (
            "model:\n  core: {kind: retnet, hads: 2}",
            "x.yaml:3:24 model.core.hads: no key 'hads' in core retnet. Did you mean 'heads'? Keys: heads, kind,",
        ),
        (
            "model: {core: {choice: [mamba, {kind: retnet, hads: 2}]}}",
            "x.yaml:2:47 model.core.retnet.hads: no key 'hads' in core retnet.",
        ),
        ("model: {core: {choice: [mamba, retnt]}}", "x.yaml:2:32 model.core: no core named 'retnt'."),
        ("trian: {}", "x.yaml:2:1 trian: no key 'trian' in a study. Did you mean 'train'?"),
        ("lr: 1e-3", "x.yaml:2:1 lr: no key 'lr' in a study. Did you mean 'train.lr'?"),
        ("train: {lrr: 1}", "x.yaml:2:9 train.lrr: no key 'lrr' in train. Did you mean 'lr'?"),
        ("workers: 4", "x.yaml:2:1 workers: 'workers' is no part of a study: give it on the command line, --workers"),
        (
            "train: {device: cuda}",
            "x.yaml:2:9 train.device: 'device' is no part of a study: give it on the command line",
        ),
        ("search: {storage: x}", "x.yaml:2:10 search.storage: 'storage' is no part of a study"),
        ("model: {width: x}", "x.yaml:2:16 model.width: expected a whole number, got 'x'. Units are k, M, G, T and %"),
        ("model: {width: 2.5}", "x.yaml:2:16 model.width: expected a whole number, got 2.5"),
        ("model: {width: [8]}", "x.yaml:2:16 model.width: expected a whole number, got [8]"),
        ("model: {width: 0}", "x.yaml:2:16 model.width: expected a number above 0, got 0"),
        ("model: {width: true}", "x.yaml:2:16 model.width: expected a number, got true"),
        ("model: {width: }", "x.yaml:2:15 model.width: expected a whole number, got null"),
        ("seed: -1", "x.yaml:2:7 seed: expected a number of 0 or more, got -1"),
        ("train: {warmup: 2}", "x.yaml:2:17 train.warmup: expected a number of 1 or less, got 2"),
        ("train: {lr: .inf}", "x.yaml:2:13 train.lr: expected a finite number, got Infinity"),
        ("train: {lr: .nan}", "x.yaml:2:13 train.lr: expected a number above 0, got NaN"),
        ("train: 3", "x.yaml:2:8 train: expected a mapping, got 3"),
        (
            "model: {core: 3}",
            "x.yaml:2:15 model.core: expected a name or a mapping with 'kind' for core, got 3. Installed",
        ),
        (
            "model: {core: {heads: 3}}",
            "x.yaml:2:15 model.core: expected a name or a mapping with 'kind' for core, got {\"heads\": 3}",
        ),
        (
            "model: {head: tyed}",
            "x.yaml:2:15 model.head: expected 'tied' or 'untied', got 'tyed'. Did you mean 'tied'?",
        ),
        ("model: {dense: {sites: 5}}", "x.yaml:2:24 model.dense.sites: expected a list or 'all', got 5"),
        ("model: {dense: {sites: [k, 3]}}", "x.yaml:2:28 model.dense.sites.1: expected a word, got 3"),
        ("model: {dense: {kind: dense}}", "x.yaml:2:23 model.dense.kind: expected 'densessm', got 'dense'"),
        ("model: {blocks: [{core: retnet, repeet: 2}]}", "x.yaml:2:33 model.blocks.0.repeet: no key 'repeet' in"),
        ("model: {depth: 2, blocks: [{core: retnet}]}", "x.yaml:2:8 model: `blocks` lists cores and their number"),
        ("model: {blocks: [{repeat: 2}]}", "x.yaml:2:18 model.blocks.0.core: this key is needed"),
        ("budget: {tolerance: 1%}", "x.yaml:2:9 budget: give exactly one of params, flops_per_token"),
        ("budget: {params: 1M}\nmodel: {width: 8}", "x.yaml:3:9 model.width: the budget chooses the width"),
        (
            "search: {objective: {minimize: valid/los}}",
            "x.yaml:2:21 search.objective: no metric named 'valid/los'. Did",
        ),
        (
            "search: {objective: {minimize: test/loss}}",
            "x.yaml:2:21 search.objective: 'test/loss' cannot be an objective",
        ),
        ("search: {objective: {}}", "x.yaml:2:21 search.objective: give exactly one of `minimize` and `maximize`"),
        ("search: {objective: []}", "x.yaml:2:9 search: name a metric"),
        (
            "search: {pruner: asha, objective: {maximize: tokens_per_second}}",
            "x.yaml:2:9 search: pruner 'asha' needs an objective that is known while a trial runs",
        ),
        ("name: a/b", "x.yaml:2:7 name: expected a name of letters, digits, '.', '_' and '-', got 'a/b'"),
        ("data: {kind: text}", "x.yaml:2:7 data.path: this key is needed"),
        ("data: {kind: python_source, valid: 60%, test: 50%}", "x.yaml:2:7 data: `valid` + `test` is 1.1"),
        ("kernels: {decay_atention: reference}", "x.yaml:2:11 kernels.decay_atention: no operation 'decay_atention'"),
        (
            "kernels: {decay_attention: refrence}",
            "x.yaml:2:28 kernels.decay_attention: decay_attention has no implementation 'refrence'. Did you mean "
            "'reference'? There are: auto, triton, numba, chunked, reference",
        ),
        ("kernels: {decay_attention: 3}", "x.yaml:2:28 kernels.decay_attention: expected a word, got 3"),
    ],
)
def test_what_is_said(tmp_path: Path, text: str, said: str) -> None:
    found = complaint(tmp_path, of(text))
    assert found.startswith(said)
    assert "\n" not in found, "one mistake, one problem"
    assert "pydantic" not in found
    assert "Input should" not in found


def test_the_version_of_the_grammar_is_needed(tmp_path: Path) -> None:
    assert complaint(tmp_path, "name: a\n") == (
        "x.yaml:1:1 dense_lab: the key `dense_lab` is missing: write `dense_lab: 1`, the version of the grammar"
    )
    for version in ("2", "true", "one"):
        assert complaint(tmp_path, f"dense_lab: {version}\n").startswith(
            "x.yaml:1:12 dense_lab: this release reads grammar 1"
        )


def test_a_file_whose_name_names_no_folder(tmp_path: Path) -> None:
    from dense_lab.errors import InputError
    from dense_lab.space import Study

    file = tmp_path / "my study.yaml"
    file.write_text("dense_lab: 1\n")
    with pytest.raises(InputError, match=r"my study.yaml:1:1 name: expected a name of letters.*, got 'my study'"):
        Study.load(file)


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    said = complaint(tmp_path, of("train: {lr: x, tokns: 1}\nmodel: {width: 0}\nseed: {int: [0, -1]}"))
    assert said.startswith("x.yaml:4:13 seed"), "open values are understood before anything else is checked"
    said = complaint(tmp_path, of("train: {lr: x, tokns: 1}\nmodel: {width: 0}"))
    assert [line.split()[0] for line in said.splitlines()] == ["x.yaml:2:13", "x.yaml:2:16", "x.yaml:3:16"]
