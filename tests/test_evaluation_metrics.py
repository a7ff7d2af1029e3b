"""The scores against values computed by hand, and their intervals against known distributions."""

import numpy as np
import pytest

from idea_jax.evaluation import metrics


def unit(*degrees):
    """Unit vectors float32[N, 3] in a plane, at these angles."""
    radians = np.radians(np.array(degrees, np.float64))
    rows = np.stack([np.cos(radians), np.sin(radians), np.zeros_like(radians)], axis=1)
    return rows.astype(np.float32)


NOTHING = np.zeros((0, 3), np.float32)


def test_similarity_is_the_mean_over_photos_of_the_most_alike_face():
    photos = unit(0, 60)
    assert metrics.similarity(unit(0), photos) == pytest.approx((1 + 0.5) / 2)
    assert metrics.similarity(unit(180), photos) == pytest.approx((-1 - 0.5) / 2)
    # Of two faces the one at 30 degrees is nearer: cos 30 twice.
    assert metrics.similarity(unit(120, 30), photos) == pytest.approx(3**0.5 / 2, abs=1e-6)
    np.testing.assert_array_equal(metrics.best_face(unit(120, 30), photos), unit(30)[0])
    for faces, seen in ((NOTHING, photos), (unit(0), NOTHING)):
        assert metrics.similarity(faces, seen) is None and metrics.best_face(faces, seen) is None


def test_angle_has_its_digits_where_the_arc_cosine_has_none():
    for degrees in (0, 0.02, 45, 90, 179.98, 180):
        one, other = unit(10, 10 + degrees)
        assert np.degrees(metrics.angle(one, other)) == pytest.approx(degrees, abs=1e-4)


def test_copy_paste_is_one_at_the_reference_and_minus_one_at_the_target():
    reference, target = unit(0, 40)
    for degrees, expected in ((0, 1), (40, -1), (20, 0), (10, 0.5), (80, -1), (-30, 1)):
        value = metrics.copy_paste(unit(degrees)[0], reference, target)
        assert value == pytest.approx(expected, abs=1e-5), degrees
    assert metrics.copy_paste(target, reference, reference) is None
    # Two references at 0 and 40, target at 80; from 0: 1 and (80 - 40) / 40 = 1.
    assert metrics.mean_copy_paste(unit(0)[0], unit(0, 40), unit(80)) == pytest.approx(1)
    # From 60: (20 - 60) / 80 = -0.5 and (20 - 20) / 40 = 0.
    assert metrics.mean_copy_paste(unit(60)[0], unit(0, 40), unit(80)) == pytest.approx(-0.25)
    assert metrics.mean_copy_paste(unit(60)[0], unit(0), unit(0)) is None
    assert metrics.mean_copy_paste(unit(60)[0], unit(0), NOTHING) is None


def test_copy_paste_keeps_within_its_range():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 3, 8))
    rows = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    values = [metrics.copy_paste(*three) for three in rows]
    assert -1 - 1e-6 <= min(values) < -0.3 and 0.3 < max(values) <= 1 + 1e-6


def test_diversity_is_over_all_pairs_of_a_prompt():
    assert metrics.diversity(unit(0, 0)) == pytest.approx(0, abs=1e-6)
    assert metrics.diversity(unit(0, 180)) == pytest.approx(2)
    # Pairs 0-60, 0-90, 60-90: cosines 0.5, 0, sqrt(3)/2.
    expected = 1 - (0.5 + 0 + 3**0.5 / 2) / 3
    assert metrics.diversity(unit(0, 60, 90)) == pytest.approx(expected, abs=1e-6)
    assert metrics.diversity(unit(0)) is None and metrics.diversity(NOTHING) is None


def test_ceiling_and_floor():
    assert metrics.pairs_of_one(unit(0), unit(60, 90)) == pytest.approx(0.25, abs=1e-6)
    assert metrics.pairs_of_one(unit(0, 60), NOTHING) == pytest.approx(0.5, abs=1e-6)
    assert metrics.pairs_of_one(unit(0), NOTHING) is None
    # Two people at 0 and 90, one of whom has two photos, and one without a face.
    first, second, third, nobody = metrics.floors([unit(0), unit(90, 90), unit(60), NOTHING])
    assert first == pytest.approx((0 + 0.5) / 2, abs=1e-6)
    assert second == pytest.approx((0 + np.cos(np.radians(30))) / 2, abs=1e-6)
    assert third == pytest.approx((0.5 + np.cos(np.radians(30))) / 2, abs=1e-6)
    assert nobody is None
    assert metrics.floors([unit(0)]) == [None]


def test_means_leave_out_what_is_missing():
    assert metrics.mean([None, 1.0, 3.0]) == 2 and metrics.mean([None]) is None
    assert metrics.share([True, False, True, False]) == 0.5 and metrics.share([]) is None


def test_an_estimate_weighs_people_by_what_they_have():
    assert metrics.estimate([]) is None
    assert metrics.estimate([1.0], [0]) is None
    assert metrics.estimate([3.0], [2]) == (1.5, None, None, 1)
    value = metrics.estimate([2.0, 9.0, 5.0], [1, 3, 0])  # the third has nothing to count
    assert value.mean == pytest.approx(11 / 4) and value.people == 2
    assert (value.low, value.high) == (2.0, 3.0)  # of two people all that can be drawn
    same = metrics.estimate([0.5] * 7)
    assert same == (0.5, 0.5, 0.5, 7)


def test_the_interval_covers_the_mean_of_a_normal_distribution_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered, widths = [], []
    for _ in range(300):
        found = metrics.estimate(rng.normal(0.3, 0.1, 40))
        covered.append(found.low <= 0.3 <= found.high)
        widths.append(found.high - found.low)
    assert 0.90 <= np.mean(covered) <= 0.98
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.1 / 40**0.5, rel=0.05)


def test_differences_are_of_the_same_people():
    ones = {"a": 0.9, "b": 0.5, "c": None, "d": 0.1}
    others = {"a": 0.8, "b": 0.4, "c": 0.3, "e": 0.7}
    value = metrics.difference(ones, others)
    assert value.mean == pytest.approx(0.1) and value.people == 2
    # What all people share has no part in it: the interval is as narrow as the differences.
    assert value.high - value.low < 1e-9
    assert metrics.difference({"a": 1.0}, {"b": 1.0}) is None
