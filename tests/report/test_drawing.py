"""Labels keep out of each other's way, and a Pareto front is one."""

import itertools
import random

import pytest

from dense_lab.report.ablation_plots import pareto
from dense_lab.report.drawing import Picture, clipped, label_points, spread


@pytest.mark.parametrize("seed", range(20))
def test_spread_values_keep_their_order_and_their_distance(seed):
    chance = random.Random(seed)
    values = [chance.gauss(0, 1) for _ in range(12)]
    found = spread(values, 0.3)
    order = sorted(range(12), key=lambda i: values[i])
    moved = [found[i] for i in order]
    assert all(b - a >= 0.3 - 1e-9 for a, b in itertools.pairwise(moved))
    assert sum(found) == pytest.approx(sum(values))


def test_values_that_are_far_apart_stay():
    assert spread([3.0, 1.0, 2.0], 0.5) == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("count", [5, 20])
def test_labels_of_crowded_points_do_not_overlap(count):
    chance = random.Random(count)
    points = [(chance.gauss(0, 1), chance.gauss(0, 0.2)) for _ in range(count)]
    boxes = []

    def paint(figure):
        axes = figure.add_subplot()
        axes.plot(*zip(*points, strict=True), "o")
        label_points(axes, points, [str(i) for i in range(count)], ["black"] * count)
        figure.draw_without_rendering()
        renderer = figure._get_renderer()
        boxes.extend(text.get_window_extent(renderer) for text in axes.texts)

    assert Picture("p", "", 4.6, 3.3, paint).svg
    # The text alone: an annotation's own extent includes the line to its point.
    assert len(boxes) == count
    plain = [box for box in boxes if box.width < 25]
    assert not any(a.overlaps(b) for i, a in enumerate(plain) for b in plain[:i])


def test_a_picture_is_the_same_for_the_same_data():
    made = [Picture("p", "", 2, 2, lambda figure: figure.add_subplot().plot([1, 2])) for _ in range(2)]
    assert made[0].svg == made[1].svg
    assert made[0].pdf() == made[1].pdf()


@pytest.mark.parametrize("seed", range(10))
def test_no_point_of_the_front_is_beaten_and_every_other_is(seed):
    chance = random.Random(seed)
    points = [(chance.randint(0, 9), chance.randint(0, 9)) for _ in range(15)]
    front = pareto(points, less=True, lower=True)

    def beaten(p):
        return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)

    assert set(front) == {p for p in points if not beaten(p)}


def test_more_of_both_may_be_better():
    assert pareto([(1, 1), (2, 2), (3, 0)], less=False, lower=False) == [(2, 2), (3, 0)]


def test_long_names_are_cut():
    assert clipped("x" * 50, 10) == "x" * 9 + "…"
    assert clipped("short", 10) == "short"
