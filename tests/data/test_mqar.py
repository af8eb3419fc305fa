"""Associative recall: the properties of the task hold for our batches and for the reference implementation's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dense_lab.corpus import IGNORED, Batch
from dense_lab_plugins.data.mqar import MQAR

ORACLES = Path(__file__).parents[1] / "oracles"


def check(inputs: np.ndarray, labels: np.ndarray, pairs: int, vocab: int) -> None:
    """Every property of the task that does not depend on how the blanks are filled."""
    shown = 2 * pairs
    for row, label in zip(inputs, labels, strict=True):
        keys, values = row[0:shown:2], row[1:shown:2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1
        assert keys.max() < vocab // 2 <= values.min()
        assert values.max() < vocab
        places = np.flatnonzero(label != IGNORED)
        assert len(places) == pairs
        assert places.min() >= shown
        assert not (places % 2).any()
        asked = row[places]
        assert sorted(asked) == sorted(keys)
        answer = dict(zip(keys, values, strict=True))
        assert [answer[key] for key in asked] == list(label[places])


def check_blanks(inputs: np.ndarray, labels: np.ndarray, pairs: int) -> None:
    """Zero everywhere but at pairs and questions."""
    blank = labels == IGNORED
    blank[:, : 2 * pairs] = False
    assert (inputs[blank] == 0).all()
    assert (inputs[~blank] != 0).all()


@pytest.mark.parametrize("name", ["mqar_L64_kv4", "mqar_L256_kv16"])
def test_reference_batches_have_the_properties(name: str) -> None:
    stored = np.load(ORACLES / f"{name}.npz", allow_pickle=False)
    said = json.loads(str(stored["meta"]))["args"]
    pairs, vocab = said["num_kv_pairs"], said["vocab_size"]
    check(stored["inputs_nofill"], stored["labels"], pairs, vocab)
    check(stored["inputs_filled"], stored["labels"], pairs, vocab)
    check_blanks(stored["inputs_nofill"], stored["labels"], pairs)


@pytest.mark.parametrize("sizes", [(64, 4, 256), (256, 16, 8192), (256, 64, 260), (4, 1, 6), (16, 4, 17)])
@pytest.mark.parametrize("blanks", ["zero", "random"])
def test_our_batches_have_the_properties(sizes: tuple[int, int, int], blanks: str) -> None:
    seq_len, pairs, vocab = sizes
    corpus = MQAR(seq_len=seq_len, pairs=pairs, vocab=vocab, blanks=blanks).prepare()
    for batch in (next(corpus.train_batches(32, seed=5)), next(corpus.eval_batches("test", 32, 32 * seq_len))):
        inputs, targets = batch.inputs.numpy(), batch.targets.numpy()
        assert inputs.shape == (32, seq_len)
        check(inputs, targets, pairs, vocab)
        if blanks == "zero":
            check_blanks(inputs, targets, pairs)


def test_random_blanks_are_uniform_over_the_vocabulary() -> None:
    corpus = MQAR(seq_len=64, pairs=1, vocab=100).prepare()
    batch = next(corpus.train_batches(1000, seed=0))
    counts = np.bincount(batch.inputs[:, 2:][batch.targets[:, 2:] == IGNORED].numpy(), minlength=100)
    expected = counts.sum() / 100
    # Each count is binomial; six standard deviations leave one false alarm in ten million runs.
    assert np.abs(counts - expected).max() < 6 * expected**0.5


def test_questions_are_where_the_power_law_puts_them() -> None:
    corpus = MQAR(seq_len=64, pairs=1, power=0.01, blanks="zero").prepare()
    batch = next(corpus.train_batches(20_000, seed=0))
    slot = (batch.targets != IGNORED).int().argmax(1).sub(2).div(2, rounding_mode="floor").numpy()
    weights = np.arange(1, 32) ** (0.01 - 1)
    probabilities = weights / weights.sum()
    counts = np.bincount(slot, minlength=31)
    deviation = (20_000 * probabilities * (1 - probabilities)) ** 0.5
    assert (np.abs(counts - 20_000 * probabilities) < 6 * deviation).all()


def test_question_places_agree_with_the_reference_on_average() -> None:
    stored = json.loads(str(np.load(ORACLES / "mqar_L256_kv16.npz", allow_pickle=False)["meta"]))
    batch = next(MQAR(seq_len=256, pairs=16).prepare().train_batches(2000, seed=1))
    _, places = np.nonzero(batch.targets.numpy() != IGNORED)
    slots = ((places - 32) / 2).reshape(2000, 16)
    # The reference's mean over 16 rows of 16 has the larger error; rows are independent, slots within one nearly so.
    error = slots.mean(1).std() / 16**0.5
    assert abs(slots.mean() - stored["stats"]["mean_query_slot"]) < 4 * error


def test_batches_depend_on_seed_and_number_alone() -> None:
    corpus = MQAR().prepare()
    batches = [batch for batch, _ in zip(corpus.train_batches(4, seed=1), range(4), strict=False)]
    torch.manual_seed(0)
    for skip, batch in enumerate(batches):
        again = next(MQAR().prepare().train_batches(4, seed=1, skip=skip))
        assert all(map(torch.equal, again, batch))
    assert not torch.equal(batches[0].inputs, batches[1].inputs)
    assert not torch.equal(batches[0].inputs, next(corpus.train_batches(4, seed=2)).inputs)


def test_evaluation_does_not_depend_on_the_batch_size_and_is_not_training_text() -> None:
    corpus = MQAR().prepare()

    def rows(batches) -> Batch:
        parts = list(batches)
        return Batch(torch.cat([b.inputs for b in parts]), torch.cat([b.targets for b in parts]))

    one, other = (rows(corpus.eval_batches("valid", size, 300 * 64)) for size in (7, 300))
    assert torch.equal(one.inputs, other.inputs)
    assert one.inputs.shape == (300, 64)
    assert torch.equal(one.inputs[:256], rows(corpus.eval_batches("valid", 64, 256 * 64)).inputs)
    splits = [one, rows(corpus.eval_batches("test", 64, 300 * 64)), next(corpus.train_batches(300, seed=0))]
    examples = {bytes(row.numpy().tobytes()) for split in splits for row in split.inputs}
    assert len(examples) == 900


def test_a_mixture_has_rows_of_every_size_by_share() -> None:
    spec = MQAR(mixture=[{"seq_len": 16, "pairs": 2, "share": 3}, {"seq_len": 32, "pairs": 8}], vocab=64, blanks="zero")
    batch = next(spec.prepare().train_batches(4000, seed=0))
    assert batch.inputs.shape == (4000, 32)
    pairs = (batch.targets != IGNORED).sum(1).numpy()
    assert set(pairs) == {2, 8}
    assert abs((pairs == 2).sum() - 3000) < 6 * (4000 * 0.75 * 0.25) ** 0.5
    for number, length in ((2, 16), (8, 32)):
        rows = pairs == number
        check(batch.inputs[rows][:, :length].numpy(), batch.targets[rows][:, :length].numpy(), number, 64)
        assert not batch.inputs[rows][:, length:].any()
        assert (batch.targets[rows][:, length:] == IGNORED).all()


@pytest.mark.parametrize("spec", [MQAR(seq_len=16, pairs=2), MQAR(mixture=[{"seq_len": 16, "pairs": 2}], vocab=64)])
def test_a_spec_is_read_again_as_it_was_written(spec: MQAR) -> None:
    assert MQAR.model_validate_json(spec.model_dump_json()) == spec


def test_a_test_asks_every_size_equally_often_at_its_own_length() -> None:
    tests = [{"seq_len": 16, "pairs": 4}, {"seq_len": 64, "pairs": 16}]
    corpus = MQAR(seq_len=32, pairs=2, tests=tests, vocab=100).prepare()
    batches = list(corpus.eval_batches("test", 7, 80 * 20))
    lengths = [batch.inputs.shape[1] for batch in batches for _ in batch.inputs]
    assert lengths == [16] * 20 + [64] * 20
    assert [corpus.task(batch) for batch in batches] == ["16-4"] * 3 + ["64-16"] * 3
    for batch in batches:
        check(batch.inputs.numpy(), batch.targets.numpy(), batch.inputs.shape[1] // 4, 100)


def test_keys_are_uniform_and_all_pairs_of_keys_are_met() -> None:
    inputs = next(MQAR(seq_len=8, pairs=2, vocab=10).prepare().train_batches(24_000, seed=0)).inputs.numpy()
    counts = np.bincount(inputs[:, 0] * 5 + inputs[:, 2], minlength=25).reshape(5, 5)[1:, 1:]
    assert not np.diag(counts).any()
    # Twelve ordered pairs of four keys; six standard deviations of a binomial count.
    others = counts[~np.eye(4, dtype=bool)]
    assert np.abs(others - 2000).max() < 6 * (24_000 / 12 * 11 / 12) ** 0.5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seq_len": 63}, "even seq_len"),
        ({"pairs": 17}, "at least 68"),
        ({"vocab": 64}, "vocab must be above"),
        ({"tests": [{"seq_len": 10, "pairs": 3}]}, "at least 12"),
        ({"pairs": 2, "mixture": [{"seq_len": 16, "pairs": 2}]}, "leave out"),
    ],
)
def test_sizes_that_do_not_fit(wrong: dict[str, int], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        MQAR(**wrong)
