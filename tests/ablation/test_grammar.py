"""Arms, baseline, seeds, tune, analysis, ablate: what they mean, and what is said when they are wrong."""

import json
import time

import pytest

from dense_lab.errors import InputError
from tests.ablation.studies import ARMS, complaint, study

OPEN = """\
dense_lab: 1
model:
  width: 16
  core: {choice: [retnet, mamba]}
  dense: {choice: [none, {span: {int: [1, 2]}, transition: {gate: {choice: [mlp, linear]}}}]}
ablate: {plan: one_at_a_time, baseline: {model.dense: densessm, model.core: retnet}}
seeds: [3, 4]
"""


def test_arms_are_closed_studies(tmp_path):
    loaded = study(tmp_path)
    runs = {arm.name: arm.run for arm in loaded.arms()}
    assert list(runs) == ["plain", "span-1", "mamba"]
    assert (runs["span-1"].model.dense.span, runs["plain"].model.dense.span) == (1, 0)
    assert (runs["mamba"].model.core.kind, runs["mamba"].model.core.state) == ("mamba", 8)
    assert (loaded.size(), loaded.space) == (6, [])
    cell = loaded.cell("mamba", 1, {"train.lr": 0.5})
    assert (cell.seed, cell.train.lr, cell.train.tokens) == (1, 0.5, 4000)
    assert cell.model == runs["mamba"].model
    assert loaded.point({"arm": "plain", "seed": 7}).seed == 7


def test_an_arm_says_what_set_would_say(tmp_path):
    first = study(
        tmp_path,
        ARMS,
        ("span-1: {model: {core: retnet, dense: {span: 1}}}", "span-1: {model.core: retnet, model.dense.span: 1}"),
    )
    assert first.cell("span-1", 0) == study(tmp_path).cell("span-1", 0)
    changed = ARMS.split("arms:")[0]
    from dense_lab.space import Study

    (tmp_path / "one.yaml").write_text(changed)
    one = Study.load(tmp_path / "one.yaml", [("model.core", "mamba"), ("model.core.state", "8")])
    assert one.point({}) == study(tmp_path).cell("mamba", 0)


def test_a_file_wins_over_nothing_and_an_arm_over_set(tmp_path):
    from dense_lab.space import Study

    study(tmp_path)
    set_too = Study.load(tmp_path / "s.yaml", [("model.core.mamba.state", "4"), ("model.depth", "3"), ("seeds", "[5]")])
    assert set_too.cell("mamba", 5).model.core.state == 8
    assert {arm.run.model.depth for arm in set_too.arms()} == {3}
    assert set_too.size() == 3


def test_a_preset_in_an_arm_starts_the_model_over(tmp_path):
    loaded = study(
        tmp_path, ARMS, ("baseline:", "  paper: {model.depth: 2, model.preset: denseretnet-350m}\nbaseline:")
    )
    model = loaded.cell("paper", 0).model
    assert (model.width, model.depth) == (1536, 2)


def test_defaults(tmp_path):
    loaded = study(tmp_path, ARMS, ("seeds: 2\n", ""))
    assert loaded.ablation.spec.seeds == (0, 1, 2, 3, 4)
    assert loaded.ablation.analysis() == {
        "metric": "test/loss", "direction": "minimize", "alpha": 0.05, "correction": "holm", "smallest_effect": None,
        "power": 0.8,
    }  # fmt: skip
    untested = study(tmp_path, ARMS, ("test_tokens: 256", "test_tokens: 0"))
    assert untested.ablation.metric == "valid/loss"
    accuracy = study(tmp_path, ARMS, ("seeds: 2", "seeds: 2\nanalysis: {metric: test/accuracy}"))
    assert accuracy.ablation.analysis()["direction"] == "maximize"
    assert accuracy.search.objective[0].maximize == "valid/accuracy"


def test_one_at_a_time(tmp_path):
    loaded = study(tmp_path, OPEN)
    assert [arm.name for arm in loaded.arms()] == ["baseline", "core=mamba", "dense=none", "span=2", "gate=linear"]
    center = loaded.cell("baseline", 3).model
    assert (center.core.kind, center.dense.span, center.dense.transition.gate.kind) == ("retnet", 1, "mlp")
    assert loaded.ablation.baseline == "baseline"
    assert loaded.size() == 10


def test_factorial(tmp_path):
    loaded = study(tmp_path, OPEN, ("one_at_a_time", "factorial"))
    names = [arm.name for arm in loaded.arms()]
    assert len(names) == len(set(names)) == 2 * (1 + 2 * 2)
    assert names[0] == "baseline"
    assert {"core=mamba span=2 gate=linear", "dense=none"} <= set(names)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("span: 1", "sapn: 1", "s.yaml:7:42 model.dense.sapn: no key 'sapn' in densessm."),
        ("model.core.state", "modl.core.state", "s.yaml:8:30 modl.core.state: no key 'modl' in a study. Did"),
        ("baseline: plain", "baseline: plian", "s.yaml:9:11 baseline: no arm named 'plian'. Did you mean 'plain'?"),
        ("baseline: plain\n", "", "s.yaml:6:3 baseline: name the arm that the others are compared"),
        ("plain: {model.core: retnet}", "plain: {}", "s.yaml:6:3 arms.plain: arm 'plain' leaves these open"),
        ("baseline:", "  same: {model.core: retnet}\nbaseline:", "s.yaml:9:3 arms.same: arms 'plain' and 'same'"),
        ("arms:", "seed: 3\narms:", "s.yaml:5:1 seed: leave it out: in an ablation `seeds` names"),
        ("arms:", "search: {trials: 3}\narms:", "s.yaml:5:1 search: leave it out: in an ablation every cell"),
        ("state: 8", "state: 8, seed: 4", "s.yaml:8:51 seed: an arm cannot change 'seed': the seeds of all arms are"),
        ("state: 8", "state: {choice: [8, 16]}", "s.yaml:8:48 arms.mamba.model.core.state: arms cannot hold"),
        ("seeds: 2", "seeds: [1, 1]", "s.yaml:10:8 seeds: a seed is here twice"),
        ("seeds: 2", "seeds: 0", "s.yaml:10:8 seeds: an ablation needs a seed at least"),
        ("seeds: 2", "seeds: 2\ntune: {lr: [1e-3], seed: 1}", "s.yaml:11:26 tune.seed: the seed 1 is one of `seeds`"),
        ("seeds: 2", "seeds: 2\ntune: {tokens: 1k}", "s.yaml:11:7 tune: give values to try, such as `lr: [1e-3"),
        ("seeds: 2", "seeds: 2\ntune: {lr: [1e-3, 0]}", "s.yaml:11:19 tune.lr.1: expected a number above 0"),
        ("seeds: 2", "seeds: 2\nanalysis: {metric: tset/loss}", "s.yaml:11:20 analysis.metric: no metric named"),
        ("seeds: 2", "seeds: 2\nanalysis: {corection: holm}", "s.yaml:11:12 analysis.corection: no key 'corection'"),
        ("seeds: 2", "seeds: 2\nablate: {}", "s.yaml:11:1 ablate: it makes the arms itself: leave out one"),
        ("tokens: 4k", "tokns: 4k", "s.yaml:4:9 train.tokns: no key 'tokns' in train. Did you mean 'tokens'?"),
        ("arms:", "trian: {}\narms:", "s.yaml:5:1 trian: no key 'trian' in a study. Did you mean 'train'?"),
    ],
)  # fmt: skip
def test_what_is_said(tmp_path, old, new, said):
    found = complaint(tmp_path, ARMS, (old, new))
    assert found.startswith(said), found
    assert "\n" not in found, "one mistake, one problem"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model.dense: densessm", "model.dens: none", "s.yaml:6:42 ablate.baseline: no open value 'model.dens'."),
        ("densessm,", "dense,", "s.yaml:6:42 ablate.baseline: model.dense: no option 'dense'. Options: densessm, none"),
        ("width: 16", "width: 16\n  dropout: {float: [0, 1%]}", "s.yaml:7:1 ablate: model.dropout cannot be listed"),
    ],
)  # fmt: skip
def test_what_is_said_of_ablate(tmp_path, old, new, said):
    assert complaint(tmp_path, OPEN, (old, new)).startswith(said)


def test_nothing_open_to_ablate_and_seeds_without_arms(tmp_path):
    said = complaint(tmp_path, "dense_lab: 1\nablate: {}\n")
    assert said.startswith("s.yaml:2:1 ablate: nothing is open: write a choice")
    assert complaint(tmp_path, "dense_lab: 1\nseeds: 3\n").startswith("s.yaml:2:1 seeds: this is for ablations: name")


def test_sizes_that_clash_name_the_arm(tmp_path):
    wrong = study(
        tmp_path,
        ARMS,
        ("state: 8", "state: 8, model.width: 6"),
        ("plain: {model.core: retnet}", "plain: {model.core: {kind: retnet, heads: 3}}"),
    )
    with pytest.raises(InputError, match=r"3 heads.*arm[ =]'?plain"):
        wrong.check_sizes()


def test_two_hundred_arms_take_a_second_or_two(tmp_path):
    gates = [f"{{gate: {g}, projection: {p}}}" for g in ("mlp", "linear", "none") for p in ("identity", "linear")]
    dense = [
        f"{{span: {span}, fusion: {f}, transition: {t}}}"
        for span in range(1, 7)
        for f in ("add", "concat", "attention")
        for t in gates
    ]
    cells = [
        f"  {core}-{n}: {{model.core: {core}, model.dense: {d}}}"
        for core in ("retnet", "mamba")
        for n, d in enumerate(dense[:100])
    ]
    head = "dense_lab: 1\nmodel: {width: 32, depth: 4, core: {choice: [retnet, mamba]}}\nbaseline: retnet-0\narms:\n"
    times = []
    for _ in range(2):
        start = time.perf_counter()
        loaded = study(tmp_path, head + "\n".join(cells) + "\n")
        runs = [arm.run.digest() for arm in loaded.arms()]
        times.append(time.perf_counter() - start)
    assert len(set(runs)) == 200
    # A second on a quiet core; `plan` promises five in all.
    assert min(times) < 4


def frozen(tmp_path):
    return json.loads(json.dumps(study(tmp_path, ARMS + "tune: {lr: [1e-3, 1e-2]}\n").freeze()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seeds: 2", "seeds: 5"),
        ("baseline: plain", "  deep: {model.core: retnet, model.depth: 4}\nbaseline: plain"),
        ("baseline: plain", "baseline: mamba"),
        ("  span-1: {model: {core: retnet, dense: {span: 1}}}\n", ""),
        ("seeds: 2", "seeds: 2\nanalysis: {alpha: 1%}"),
        ("model.core: mamba, model.core.state: 8", "model.core: {kind: mamba, state: 8}"),
    ],
)
def test_what_may_change(tmp_path, old, new):
    study(tmp_path, ARMS + "tune: {lr: [1e-3, 1e-2]}\n", (old, new)).check_frozen(frozen(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("span: 1", "span: 2", "s.yaml:7:11 arms.span-1: model.dense.span was 1 when study 's' began, 2 now"),
        ("tokens: 4k", "tokens: 5k", "s.yaml:4:17 train.tokens: 4000 when study 's' began, 5000 now"),
        ("[1e-3, 1e-2]", "[1e-3]", "s.yaml:11:12 tune.lr: [0.001, 0.01] when study 's' began, [0.001] now"),
        ("\ntune: {lr: [1e-3, 1e-2]}", "", "s.yaml:1:1 tune.lr: [0.001, 0.01] when study 's' began, absent now"),
    ],
)  # fmt: skip
def test_what_may_not(tmp_path, old, new, said):
    manifest = frozen(tmp_path)
    with pytest.raises(InputError) as caught:
        study(tmp_path, ARMS + "tune: {lr: [1e-3, 1e-2]}\n", (old, new)).check_frozen(manifest)
    assert str(caught.value).replace(f"{tmp_path}/", "").startswith(said)


def test_a_search_cannot_become_an_ablation(tmp_path):
    search = study(tmp_path, ARMS.split("arms:")[0])
    with pytest.raises(InputError, match="began as a search and is an ablation now"):
        study(tmp_path).check_frozen(json.loads(json.dumps(search.freeze())))


def test_the_digest_is_that_of_what_arms_mean(tmp_path):
    digest = study(tmp_path).digest()
    assert study(tmp_path, ARMS, ("seeds: 2", "seeds: 9"), ("baseline: plain", "baseline: mamba")).digest() == digest
    assert study(tmp_path, ARMS, ("span: 1", "span: 2")).digest() != digest
    again = study(tmp_path, json.dumps(study(tmp_path).tree))
    assert (again.digest(), [arm.run for arm in again.arms()]) == (digest, [arm.run for arm in study(tmp_path).arms()])
