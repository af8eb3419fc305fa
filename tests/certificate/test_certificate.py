"""The fairness certificate: a fair study by hand, and one thing made unfair at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dense_lab.certificate import Certificate, certificate
from dense_lab.files import read_json, write_json
from dense_lab.results import read_study

ARMS, SEEDS, RATES = ("plain", "span-1"), (0, 1, 2), (1e-3, 3e-3)
TRAIN = {"tokens": 1000, "batch_tokens": 100, "lr": 3e-3, "weight_decay": 0.1, "checkpoints": 0}
TAGS = {
    "data": "d" * 64,
    "commit": "c" * 40,
    "torch": "2.13.0",
    "plugins": "builtin=0.1.0",
    "code": "dense_lab=01234567,dense_lab_plugins=89abcdef",
    "device": "cpu (1 threads)",
    "dtype": "float32",
    "implementations": "decay_attention=numba,rotate=reference",
    "kernels.verified": "all",
}


def write_trial(folder: Path, role: str, arm: str, seed: int, lr: float) -> None:
    """As the search and the trainer write it; 1,000,000 parameters outside of the embedding."""
    number = len(list(folder.glob("trials/*")))
    trial = folder / "trials" / f"{number:04d}"
    params = {"arm": arm, "seed": seed} | ({"train.lr": lr} if role == "tune" else {})
    write_json(trial / "trial.json", {"label": arm, "role": role, "params": params, "tags": {"arm": arm}})
    write_json(trial / "spec.json", {"data": {"kind": "bytes"}, "train": {**TRAIN, "lr": lr}, "seed": seed})
    metrics = {"parameters": 1_200_000, "embedding_parameters": 200_000, "flops_per_token": 2e6, "state_bytes": 4096.0}
    metrics |= {"valid/loss": 5 - lr} | ({"test/loss": 5.0} if role == "cell" else {})
    tags = {**TAGS, "batches": f"b{seed}"}
    write_json(trial / "result.json", {"status": "complete", "reason": "", "metrics": metrics, "tags": tags})


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A fair ablation of two arms, each tuned over two rates, with three seeds."""
    analysis = {"metric": "test/loss", "direction": "minimize", "alpha": 0.05, "correction": "holm"}
    ablation = {"baseline": "plain", "arms": {arm: {} for arm in ARMS}, "seeds": SEEDS, "analysis": analysis}
    ablation["tune"] = {"lr": RATES, "weight_decay": [], "tokens": None, "seed": 100}
    write_json(tmp_path / "study.json", {"x-name": "s", "x-search": {}, "x-ablation": ablation})
    write_json(tmp_path / "manifest.json", {"fixed": {}, "arms": {arm: {} for arm in ARMS}, "trials": 10})
    for arm in ARMS:
        for lr in RATES:
            write_trial(tmp_path, "tune", arm, 100, lr)
    for seed in SEEDS:
        for arm in ARMS:
            write_trial(tmp_path, "cell", arm, seed, 3e-3)
    return tmp_path


def change(path: Path, *changes: tuple[tuple[str, ...], Any]) -> None:
    """Set values of a JSON file by their keys."""
    content = read_json(path)
    for keys, value in changes:
        place = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
    write_json(path, content)


def judged(study: Path) -> Certificate:
    return certificate(read_study(study))


def failing(study: Path) -> list[str]:
    return [clause.name for clause in judged(study).clauses if not clause.passed]


def last(study: Path, name: str) -> Path:
    """A file of the last cell: span-1 with seed 2."""
    return study / "trials" / "0009" / name


def every(study: Path, arm: str, name: str) -> list[Path]:
    files = sorted((study / "trials").glob(f"*/{name}"))
    return [file for file in files if read_json(file.parent / "trial.json")["label"] == arm]


def test_a_fair_study(study: Path) -> None:
    found = judged(study)
    assert found.fair
    assert found.line() == (
        "FAIR: 2 arms, 3 seeds each; non-embedding parameters within 0 % (limit 5 %); FLOPs per token within 0 % "
        "(limit 15 %); held for all arms: data, batches, tokens, tuning, selection, device, code, kernels"
    )
    told = json.loads(json.dumps(found.as_json()))
    assert told["fair"] is True
    assert told["clauses"][0] == {"name": "seeds", "passed": True, "detail": "2 arms, 3 seeds each"}


def result(*keys: str, value: Any) -> Callable[[Path], None]:
    """Changes every cell of span-1."""

    def act(study: Path) -> None:
        for path in every(study, "span-1", "result.json"):
            change(path, (keys, value))

    return act


def specified(*keys: str, value: Any) -> Callable[[Path], None]:
    """Changes the spec of every cell of span-1."""

    def act(study: Path) -> None:
        for path in every(study, "span-1", "spec.json"):
            change(path, (keys, value))

    return act


def one(name: str, *keys: str, value: Any) -> Callable[[Path], None]:
    """Changes the last cell."""
    return lambda study: change(last(study, name), (keys, value))


UNFAIR: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "size": (result("metrics", "parameters", value=1_300_000), "parameters", "1.1M, +10 % from 1M (limit 5 %)"),
    "embedding": (result("metrics", "embedding_parameters", value=100_000), "parameters", "+10 %"),
    "flops": (result("metrics", "flops_per_token", value=2.6e6), "FLOPs", "+30 % from 2M (limit 15 %)"),
    "no size": (result("metrics", "flops_per_token", value=None), "FLOPs", "not recorded of span-1"),
    "head": (specified("model", value={"head": "untied"}), "parameters", "head differs"),
    "data": (one("result.json", "tags", "data", value="e" * 64), "data", "hash differs"),
    "reading": (one("spec.json", "data", "kind", value="lines"), "data", "keys differs"),
    "batches": (one("result.json", "tags", "batches", value="b7"), "batches", "sequence of seed 2 differs"),
    "no batches": (one("result.json", "tags", "batches", value=""), "batches", "not recorded of span-1"),
    "precision": (one("result.json", "tags", "dtype", value="bfloat16"), "device", "precision differs"),
    "device": (one("result.json", "tags", "device", value="NVIDIA H200"), "device", "device differs: cpu (plain"),
    "commit": (one("result.json", "tags", "commit", value="d" * 40), "code", "commit differs"),
    "source": (one("result.json", "tags", "code", value="dense_lab=00000000"), "code", "source of dense_lab differs"),
    "plugin": (one("result.json", "tags", "plugins", value="builtin=0.2.0"), "code", "plugin of builtin differs"),
    "kernel": (
        one("result.json", "tags", "implementations", value="decay_attention=triton"),
        "kernels",
        "implementation of decay_attention differs: numba, triton",
    ),
    "unverified": (
        one("result.json", "tags", "kernels.verified", value="unverified: decay_attention/numba"),
        "kernels",
        "unverified: decay_attention/numba (span-1)",
    ),
    "unchecked": (one("result.json", "tags", "kernels.verified", value="unverified: no"), "kernels", "unverified: no"),
    "failed": (one("result.json", "status", value="failed"), "seeds", "span-1 lacks 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFAIR)
def test_one_thing_unfair(study: Path, name: str) -> None:
    spoil, clause, detail = UNFAIR[name]
    spoil(study)
    assert failing(study) == [clause]
    assert judged(study).line().startswith("NOT FAIR: ")
    assert detail in judged(study).line()


@pytest.mark.parametrize("commit", ["unknown", "c" * 40 + "-dirty"])
def test_code_that_is_in_no_commit_is_told(study: Path, commit: str) -> None:
    for arm in ARMS:
        for path in every(study, arm, "result.json"):
            change(path, (("tags", "commit"), commit))
    assert judged(study).fair
    assert f"; commit {commit[:12]}, whose code is in no commit" in judged(study).line()
    assert "; the source of dense-lab and of its plugins stayed the same" in judged(study).line()
    for arm in ARMS:
        for path in every(study, arm, "result.json"):
            change(path, (("tags", "code"), ""))
    assert "whether it stayed the same is not recorded" in judged(study).line()


def test_tokens(study: Path) -> None:
    for path in every(study, "span-1", "spec.json"):
        change(path, (("train", "tokens"), 2000))
    assert failing(study) == ["tokens"]
    assert "tokens differs: 1000 (plain); 2000 (span-1)" in judged(study).line()


def test_gradient_accumulation_is_no_difference(study: Path) -> None:
    for path in every(study, "span-1", "spec.json"):
        change(path, (("train", "micro_batch_tokens"), 50))
    for path in every(study, "span-1", "result.json"):
        change(path, (("tags", "device"), "cpu (2 threads)"))
    assert judged(study).fair


def test_an_arm_that_was_not_tuned(study: Path) -> None:
    for path in every(study, "span-1", "trial.json"):
        if read_json(path)["role"] == "tune":
            change(path, (("role",), "other"))
    assert failing(study) == ["tuning"]
    assert "span-1 was not tuned" in judged(study).line()


def test_a_smaller_grid(study: Path) -> None:
    change(study / "trials" / "0002" / "trial.json", (("role",), "other"))
    assert failing(study) == ["tuning"]
    assert "grid differs" in judged(study).line()


def test_rates_that_are_not_the_best_on_validation(study: Path) -> None:
    change(study / "trials" / "0002" / "result.json", (("metrics", "valid/loss"), 1.0))
    assert failing(study) == ["selection"]
    assert "span-1 is not trained with its best rates" in judged(study).line()


def test_tuning_that_saw_the_test_split(study: Path) -> None:
    change(study / "trials" / "0000" / "result.json", (("metrics", "test/loss"), 1.0))
    assert failing(study) == ["selection"]


def test_compared_on_the_split_of_the_tuning(study: Path) -> None:
    change(study / "study.json", (("x-ablation", "analysis", "metric"), "valid/loss"))
    assert failing(study) == ["selection"]
    change(study / "study.json", (("x-ablation", "tune"), None))
    assert judged(study).fair


def test_unlike_rates_without_tuning(study: Path) -> None:
    change(study / "study.json", (("x-ablation", "tune"), None))
    for path in every(study, "span-1", "spec.json"):
        change(path, (("train", "lr"), 1e-2))
    assert failing(study) == ["tuning"]
    assert "lr differs: 0.003 (plain); 0.01 (span-1), and no arm was tuned" in judged(study).line()


def test_a_failed_tuning_trial_counts_as_tried(study: Path) -> None:
    change(study / "trials" / "0002" / "result.json", (("status",), "failed"))
    assert judged(study).fair


def test_two_seeds_are_too_few(study: Path) -> None:
    change(study / "study.json", (("x-ablation", "seeds"), [0, 1]))
    for number in ("0008", "0009"):
        change(study / "trials" / number / "trial.json", (("role",), "other"))
    assert failing(study) == ["seeds"]
    assert "2 where at least 3 are needed" in judged(study).line()


def test_seeds_besides_those_of_the_study(study: Path) -> None:
    write_trial(study, "cell", "span-1", 3, 3e-3)
    assert failing(study) == ["seeds"]
    # Added until decided they are no fault, so long as the baseline has them too.
    change(study / "manifest.json", (("looks",), [3, 10]))
    assert failing(study) == ["seeds"]
    assert "the baseline lacks 3 of span-1" in judged(study).line()
    write_trial(study, "cell", "plain", 3, 3e-3)
    assert judged(study).fair
    write_trial(study, "cell", "plain", 4, 3e-3)
    assert judged(study).fair
    assert "3 to 4" not in judged(study).line()
    assert "4 to 5, added until decided, seeds each" in judged(study).line()


BUDGETS = {
    "params": ({"budget.params": 1_000_000, "budget.tolerance": 0.2}, 1_200_000 + 150_000, ["FLOPs"], 2.6e6),
    "params, 16 %": ({"budget.params": 1_000_000}, 1_200_000, ["FLOPs"], 2.32e6),
    "params, told": ({"budget.params": 1_000_000, "budget.flops_tolerance": 0.2}, 1_200_000, [], 2.32e6),
    "params, all": ({"budget.params": 1_200_000, "budget.tolerance": 0.01, "budget.count": "all"}, 1_205_000, [], 2e6),
    "params, tight": ({"budget.params": 1_000_000, "budget.tolerance": 0.01}, 1_220_000, ["parameters"], 2e6),
    "flops": ({"budget.flops_per_token": 2e6, "budget.tolerance": 0.01}, 1_220_000, [], 2.01e6),
    "flops, off": ({"budget.flops_per_token": 2e6, "budget.tolerance": 0.1}, 1_500_000, ["parameters", "FLOPs"], 2.3e6),
    "state": ({"budget.state_bytes": 4000, "budget.tolerance": 0.01}, 1_200_000, ["state"], 2e6),
}  # fmt: skip


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets(study: Path, name: str) -> None:
    budget, parameters, expected, flops = BUDGETS[name]
    change(study / "manifest.json", (("fixed",), budget))
    for path in every(study, "span-1", "result.json"):
        change(path, (("metrics", "parameters"), parameters), (("metrics", "flops_per_token"), flops))
    assert failing(study) == expected


def test_a_budget_of_its_own_is_no_excuse(study: Path) -> None:
    change(study / "manifest.json", (("arms", "span-1"), {"budget.params": 2_000_000, "budget.tolerance": 0.01}))
    for path in every(study, "span-1", "result.json"):
        change(path, (("metrics", "parameters"), 2_205_000))
    assert failing(study) == ["parameters"]
    assert judged(study).line().endswith("; held: FLOPs per token within 0 % (limit 15 %)")


def test_references_need_no_verification(study: Path) -> None:
    for arm in ARMS:
        for path in every(study, arm, "result.json"):
            change(path, (("tags", "implementations"), "rotate=reference"), (("tags", "kernels.verified"), ""))
    assert judged(study).fair


def test_a_search_and_a_study_that_has_just_begun(study: Path) -> None:
    for trial in (study / "trials").iterdir():
        (trial / "result.json").unlink()
    assert judged(study).line() == "NOT FAIR: seeds: no cell is complete"
    write_json(study / "study.json", {"x-name": "s", "x-search": {}})
    assert judged(study).line().startswith("NOT FAIR: arms: a search")
