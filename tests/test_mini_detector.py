"""The mini's face detector: what it learns from, what it is told, and that insightface runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from insightface.utils import face_align
from PIL import Image

from idea_jax.faces import finding
from idea_jax.faces import models as face_models
from idea_jax.faces.crops import alignment
from idea_jax.mini import composites, detector, drawings, measures, people

TEMPLATE = np.array(face_align.arcface_dst)


def placed(angle, side, centre):
    """The five points of a face whose crop has this side, angle (degrees) and middle."""
    c, s = np.cos(np.radians(angle)) * side / 112, np.sin(np.radians(angle)) * side / 112
    return (TEMPLATE - 55.5) @ np.array([[c, s], [-s, c]]) + centre


# --- pictures -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    """Drawings whose middles of the eyes, and corners of the mouth, are marked by colours."""
    rng = np.random.default_rng(0)
    count, side = 6, 64
    points = np.stack(
        [placed(rng.uniform(-5, 5), 40, rng.uniform(29, 35, 2)) for _ in range(count)]
    )
    images = np.full((count, side, side, 3), 128, np.uint8)
    rows, columns = np.mgrid[:side, :side]
    for image, five in zip(images, points, strict=True):
        for (x, y), colour in zip(five, MARKS, strict=True):
            image[np.hypot(columns - x, rows - y) < 2.5] = colour
    return composites.Drawn(images, points[:, None].astype(np.float32))


# One for each point; a mirrored drawing has the colours of left and right exchanged.
MARKS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]])


@pytest.fixture(scope="module")
def pictures(drawn):
    rng = np.random.default_rng(1)
    return [composites.compose(rng, drawn, drawn) for _ in range(150)]


def test_crop_square_is_that_of_insightfaces_alignment():
    for angle, side, centre in ((0, 112, (55.5, 55.5)), (-50, 30, (100, 40)), (170, 250, (0, 9))):
        points = placed(angle, side, np.array(centre))
        got_centre, got_side = composites.crop_square(points)
        np.testing.assert_allclose(got_centre, centre, atol=1e-4)
        assert got_side == pytest.approx(side, rel=1e-5)
        matrix = alignment(points)
        corners = np.array([[0, 0], [111, 0], [111, 111], [0, 111]]) - matrix[:, 2]
        corners = corners @ np.linalg.inv(matrix[:, :2]).T
        np.testing.assert_allclose(corners.mean(0), got_centre, atol=1e-3)
        reach = np.linalg.norm(corners[1] - corners[0]) * 112 / 111
        assert reach == pytest.approx(got_side, rel=1e-4)
    both = composites.crop_square(jnp.asarray(np.stack([points, points + 1])))
    np.testing.assert_allclose(both[0][1] - both[0][0], 1, atol=1e-3)


def test_points_of_a_picture_lie_on_what_they_mark(pictures):
    """Each has the colour of its mark, or of its mirror image's; noise and light change it."""
    right = looked = 0
    for picture in pictures:
        for five, state in zip(picture.points, picture.state, strict=True):
            if state != composites.WHOLE:
                continue
            _, side = composites.crop_square(five)
            inside = ((five >= 1) & (five < composites.SIZE - 1)).all(1)
            if side < 40 or not inside.all():
                continue
            x, y = five.round().astype(int).T
            seen = picture.image[y, x].astype(int)
            for marks in (MARKS, MARKS[[1, 0, 2, 4, 3]]):
                # Which of the five colours is nearest, for all of them at once.
                nearest = np.abs(seen[:, None] - marks[None]).sum(-1).argmin(1)
                if (nearest == np.arange(5)).all():
                    right += 1
                    break
            looked += 1
    assert looked > 50 and right / looked > 0.9


def test_pictures_show_every_case(pictures):
    states = np.stack([picture.state for picture in pictures])
    whole = (states == composites.WHOLE).sum(1)
    assert {0, 1, 2} <= set(whole.tolist())
    assert 0.02 < (states == composites.CUT).mean() < 0.2
    sides, angles = [], []
    for picture in pictures:
        for five in picture.points[picture.state == composites.WHOLE]:
            sides.append(composites.crop_square(five)[1])
            angles.append(np.degrees(np.arctan2(*(five[1] - five[0])[::-1])))
    assert min(sides) < 46 and max(sides) > 190
    assert np.quantile(angles, 0.03) < -30 and np.quantile(angles, 0.97) > 30
    assert np.abs(angles).max() < composites.TURNED + 8  # the drawings are turned a little, too
    # Faces are apart, and none is found where nobody is.
    for picture in pictures:
        there = picture.points[picture.state != composites.NONE]
        centres, sizes = composites.crop_square(there)
        for i in range(len(there)):
            for j in range(i):
                assert np.linalg.norm(centres[i] - centres[j]) > 0.2 * min(sizes[i], sizes[j])


@pytest.mark.parametrize(
    ("centre", "state"),
    [
        ((128, 128), composites.WHOLE),
        ((20, 128), composites.WHOLE),  # one eye and one corner of the mouth beyond the edge: cut
        ((-20, 128), composites.CUT),
        ((-80, 128), composites.NONE),
    ],
)
def test_a_face_at_the_edge(centre, state):
    five = placed(0, 100, np.array(centre))
    if centre == (20, 128):
        five = placed(0, 60, np.array(centre))
    assert composites._state(five, (256, 256)) == state


# --- learning -------------------------------------------------------------------------------------


def answer(points, state):
    """What a perfect detector says of one picture, as `Detector` returns it."""
    found = []
    for stride, anchors in zip(detector.STRIDES, detector.ANCHORS, strict=True):
        count = composites.SIZE // stride
        place = stride * np.stack(np.meshgrid(np.arange(count), np.arange(count)), -1)
        score = np.full((count, count, 2), -12.0)
        box, five = np.zeros((count, count, 2, 4)), np.zeros((count, count, 2, 5, 2))
        for face, what in zip(points, state, strict=True):
            if what != composites.WHOLE:
                continue
            centre, side = composites.crop_square(face)
            half = detector.BOX * side / 2
            apart = np.linalg.norm(place - centre, axis=-1)
            for a, anchor in enumerate(anchors):
                off = centre - place
                box[..., a, :] = np.concatenate([half - off, half + off], -1) / anchor
                five[..., a, :, :] = (face - place[:, :, None]) / anchor
                clipped = np.clip(side, detector.ANCHORS[0][0], detector.ANCHORS[-1][-1])
                fits = abs(np.log(clipped / anchor)) < 0.6 * detector.STEP
                score[..., a][(apart < max(0.22 * side, 0.75 * stride)) & fits] = 12.0
        found.append(tuple(jnp.asarray(x[None], jnp.float32) for x in (score, box, five)))
    return found


@pytest.mark.parametrize("side", [36, 50, 66, 77, 120, 160, 220])
def test_loss_is_zero_for_the_right_answer_and_for_it_alone(side):
    points = np.stack([placed(20, side, np.array([131.0, 117.0])), np.zeros((5, 2))])
    state = np.array([composites.WHOLE, composites.NONE])
    args = jnp.asarray(points[None], jnp.float32), jnp.asarray(state[None])
    right = answer(points, state)
    assert any((score > 0).any() for score, _, _ in right)
    assert detector.loss(right, *args) < 1e-3
    silent = [(-jnp.abs(score), box, five) for score, box, five in right]
    assert detector.loss(silent, *args) > 1
    for part in (1, 2):
        off = [tuple(x + 0.1 * (i == part) for i, x in enumerate(level)) for level in right]
        weight = (detector.BOX_WEIGHT, detector.POINTS_WEIGHT)[part - 1]
        assert detector.loss(off, *args) == pytest.approx(0.1 * weight, rel=1e-2)


def test_loss_leaves_what_is_cut_alone_and_nothing_else():
    points = placed(0, 80, np.array([-10.0, 100.0]))[None]
    for state, least in ((composites.CUT, 0), (composites.NONE, 5)):
        found = answer(points, np.array([composites.WHOLE]))  # says that it is there
        value = detector.loss(found, jnp.asarray(points[None], jnp.float32), jnp.asarray([[state]]))
        assert least <= value < least + 1e-2 or (least and value > least)


# --- insightface ----------------------------------------------------------------------------------


def test_insightface_reads_off_what_the_network_says(tmp_path, monkeypatch):
    """A network without kernels at its end says one thing everywhere: its biases."""
    net = detector.DetectorNet((4, 8, 8, 8), blocks=1)
    params = net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape), params)
    params["score_16"]["bias"] = jnp.array([0.0, 3.0])
    detector.write_onnx(tmp_path / "detector.onnx", net, params)
    loaded = face_models.load_detector(tmp_path / "detector.onnx")
    size = composites.SIZE
    assert loaded.model.static_input_size == (size, size)
    image = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
    half = jax.tree.map(lambda x: jnp.asarray(np.float16(x), jnp.float32), params)
    found = net.apply({"params": half}, detector.scaled(np.asarray(image))[None])
    expected = []
    for (score, box, five), stride, anchors in zip(
        found, detector.STRIDES, detector.ANCHORS, strict=True
    ):
        count = size // stride
        place = stride * np.stack(np.meshgrid(np.arange(count), np.arange(count)), -1)[:, :, None]
        side = np.array(anchors)[:, None]
        sure = np.asarray(jax.nn.sigmoid(score[0]))
        box = np.asarray(box[0]) * side
        corners = np.concatenate([place - box[..., :2], place + box[..., 2:]], -1)
        points = place[..., None, :] + np.asarray(five[0]) * side[..., None]
        expected += list(
            zip(corners[sure > 0.5], points[sure > 0.5], sure[sure > 0.5], strict=True)
        )
    best = max(expected, key=lambda face: face[2])
    got = max(finding.detect(loaded, image), key=lambda face: face.score)
    assert got.score == pytest.approx(best[2], abs=1e-3)
    np.testing.assert_allclose(got.box, best[0], atol=0.1)
    np.testing.assert_allclose(got.points, best[1], atol=0.1)


def test_findings_are_counted_and_measured(monkeypatch):
    """Two faces, one cut: one found a little off, one finding that is none, one of the cut face."""
    there = [placed(0, 80, np.array(c)) for c in ((70.0, 70.0), (180.0, 180.0), (250.0, 30.0))]
    state = np.array([composites.WHOLE, composites.WHOLE, composites.CUT])
    picture = composites.Composite(np.zeros((256, 256, 3), np.uint8), np.stack(there), state)
    found = [
        placed(3, 80 * 1.05, np.array([74.0, 70.0])),
        placed(0, 40, np.array([30.0, 200.0])),
        there[2] + 1,
    ]
    answers = [finding.Face(np.zeros(4), points, 0.9) for points in found]
    monkeypatch.setattr(finding, "detect", lambda *_, **__: answers)
    done = measures.detect(None, [picture])
    assert (done.faces, done.right, done.wrong) == (2, 1, 1)
    off = np.linalg.norm(found[0] - there[0], axis=1).mean()
    eyes = np.linalg.norm(there[0][1] - there[0][0])
    np.testing.assert_allclose(done.points, [off / eyes], rtol=1e-5)


def test_drawings_of_pairs_say_where_both_faces_are():
    images, points = drawings.pairs(people.unnamed("validation", 5), 3, jax.random.key(0))
    assert images.shape == (3, 64, 64, 3) and points.shape == (3, 2, 5, 2)
    assert (points[:, 0, :, 0] < 32).all() and (points[:, 1, :, 0] > 31).all()
