"""Finding, choosing and aligning a face: insightface's code around a detector of fixed answers."""

import dataclasses
import hashlib
from pathlib import Path

import insightface
import numpy as np
import pytest
import scrfd
from PIL import Image
from skimage import data

from idea_jax.data import images
from idea_jax.faces import embedding, finding, packs, random_model
from idea_jax.faces import models as face_models
from idea_jax.faces.crops import align, training_square, turned_back
from idea_jax.mini import strangers
from idea_jax.models import hub

GROUP = Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"  # six people
ALIGNED = GROUP.with_name("Tom_Hanks_54745.png")  # an aligned crop of one face
# Read off the pictures by eye: eyes, nose, corners of the mouth.
WOMAN = np.array([[85, 327], [130, 308], [118, 340], [112, 370], [140, 357]])
MAN = np.array([[918, 120], [958, 118], [926, 150], [930, 172], [958, 172]])
LAUGHING = np.array([[765, 390], [810, 392], [780, 420], [765, 440], [805, 447]])
ASTRONAUT = np.array([[203, 101], [247, 103], [226, 125], [206, 142], [242, 142]])

GREY = (127, 127, 127)  # of the border that is put around pictures


@pytest.fixture
def make(tmp_path):
    """Returns a function that opens a pack with given faces, in pixels of the detector's input."""

    def opened(found, *, select="largest", **detector):
        folder = tmp_path / "pack"
        folder.mkdir(exist_ok=True)
        scrfd.write_detector(folder / "det.onnx", found, **detector)
        random_model.write_random_recogniser(folder / "rec.onnx")
        return finding.open_finder(folder / "rec.onnx", select=select)

    return opened


def on_group(points, score=0.9):
    """A face of the group photo, as the detector sees it at half the size."""
    points = points / 2
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.6 * (high - low).max()
    return np.concatenate([low - margin, high + margin / 2]), points, score


def save(tmp_path, image, name="photo.png", **options):
    image.save(tmp_path / name, **options)
    return images.PictureFile(tmp_path / name)


# --- what insightface makes of it -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`estimate` is deprecated:FutureWarning")
def test_chain_equals_insightfaces_own(make):
    """The same faces, doubles suppressed, and the same embedding as its FaceAnalysis."""
    from insightface.app import FaceAnalysis

    finder = make([on_group(WOMAN), on_group(MAN, 0.8), on_group(LAUGHING, 0.7)])
    picture = images.PictureFile(GROUP)
    found = finding.find_faces(finder.detector, picture.read(), picture)
    app = FaceAnalysis(str(finder.detector.path.parent), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_size=(640, 640))
    theirs = sorted(
        app.get(np.ascontiguousarray(np.asarray(picture.read())[:, :, ::-1])),
        key=lambda face: face.bbox[0],
    )
    assert len(found) == len(theirs) == 3
    for ours, face in zip(found, theirs, strict=True):
        np.testing.assert_allclose(ours.box, face.bbox, atol=1e-3)
        np.testing.assert_allclose(ours.points, face.kps, atol=1e-3)
        assert ours.score == pytest.approx(face.det_score)
    np.testing.assert_allclose(found[0].points, WOMAN, atol=0.1)
    np.testing.assert_allclose(found[2].points, MAN, atol=0.1)
    for number, face in enumerate(theirs):
        sight = finding.Finder(finder.recogniser, finder.detector, str(number)).look(picture)
        np.testing.assert_allclose(sight.embed, face.normed_embedding, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(sight.embed), 1, rtol=1e-6)


def test_detector_sees_the_picture_in_rgb(make, tmp_path):
    image = Image.new("RGB", (640, 640), "white")
    image.paste((250, 120, 10), (0, 0, 40, 40))
    picture = save(tmp_path, image)
    found = [scrfd.face(320, 320, 100)]
    assert make(found, only_with_corner=(250, 120, 10)).look(picture).score == pytest.approx(0.9)
    with pytest.raises(face_models.FaceError, match="no face found"):
        make(found, only_with_corner=(10, 120, 250)).look(picture)


def test_a_real_face_comes_out_as_the_aligned_crop_shows_it(make, tmp_path):
    """The portrait's eyes and mouth are where those of insightface's aligned picture are."""
    scale = 640 / 512
    finder = make([(np.array([180, 67, 272, 175]) * scale, ASTRONAUT * scale, 0.9)])
    picture = save(tmp_path, Image.fromarray(data.astronaut()))
    sight = finder.look(picture)
    np.testing.assert_allclose(sight.points, ASTRONAUT, atol=0.1)
    crop = align(picture.read(), sight.points).astype(float).mean(axis=2)
    other = np.asarray(images.read_image(ALIGNED)).astype(float).mean(axis=2)
    for pixels in (crop, other):  # eyes are darker than the cheeks below them
        assert pixels[47:57, 33:43].mean() < pixels[66:76, 33:43].mean() - 10
        assert pixels[47:57, 68:78].mean() < pixels[66:76, 68:78].mean() - 10


# --- alignment ------------------------------------------------------------------------------------

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]])


def dotted(matrix, size=(700, 600)):
    """A picture of five coloured discs where a similarity of the template puts the points."""
    centers = scrfd.apply(matrix, scrfd.TEMPLATE)
    radius = 6 * np.hypot(*matrix[:, 0])
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    offsets = [(i / 4, j / 4) for i in (-1, 0, 1) for j in (-1, 0, 1)]  # smooths the edges
    pixels = np.zeros((height, width, 3))
    for center, colour in zip(centers, COLOURS, strict=True):
        inside = [np.hypot(x + i - center[0], y + j - center[1]) < radius for i, j in offsets]
        pixels += np.mean(inside, axis=0)[:, :, None] * colour
    return Image.fromarray(pixels.astype(np.uint8)), centers.astype(np.float32)


def dots(crop):
    """Where the discs are in a picture: [5, 2]."""
    x, y = np.meshgrid(np.arange(crop.shape[1]), np.arange(crop.shape[0]))
    places = []
    for colour in COLOURS:
        inside = ((crop > 127) == (colour > 0)).all(axis=2)
        places.append([x[inside].mean(), y[inside].mean()])
    return np.array(places)


@pytest.mark.parametrize("angle", [0, 17, -40, 90, 180])
@pytest.mark.parametrize("scale", [0.6, 1.0, 2.6, 4.4])
@pytest.mark.parametrize("shift", [(0, 0), (31.5, -12.25)])
def test_alignment_undoes_a_similarity(angle, scale, shift):
    """Measured on the pixels: the angle within 0.5 degrees, the scale within 1 %."""
    middle = (
        np.array([350, 300])
        + shift
        - scrfd.apply(scrfd.similarity(angle, scale, (0, 0)), [[56, 56]])
    )
    image, points = dotted(scrfd.similarity(angle, scale, middle[0]))
    seen = dots(align(image, points))
    # Least squares for x' = a x - b y + c, y' = b x + a y + d.
    x, y = scrfd.TEMPLATE.T
    one, zero = np.ones(5), np.zeros(5)
    left = np.concatenate(
        [np.stack([x, -y, one, zero], axis=1), np.stack([y, x, zero, one], axis=1)]
    )
    (a, b, *_), *_ = np.linalg.lstsq(left, np.concatenate([seen[:, 0], seen[:, 1]]), rcond=None)
    assert abs(np.degrees(np.arctan2(b, a))) < 0.5
    assert abs(np.hypot(a, b) - 1) < 0.01
    np.testing.assert_allclose(seen, scrfd.TEMPLATE, atol=0.6)


def test_large_face_is_averaged_down():
    """Stripes of single pixels on a face of 900 pixels become grey, instead of a pattern."""
    checks = (np.indices((1000, 1000)).sum(0) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(checks).convert("RGB")
    crop = align(image, scrfd.TEMPLATE * 8.5 + 20)
    np.testing.assert_allclose(crop[10:-10, 10:-10], 127.5, atol=2)


@pytest.mark.parametrize(
    ("points", "says"),
    [
        (np.full((5, 2), np.nan), "not finite"),
        (np.where(np.arange(10).reshape(5, 2) == 3, np.inf, scrfd.TEMPLATE), "not finite"),
        (np.full((5, 2), 40.0), "coincide"),
        (40 + 0.5 * np.random.default_rng(0).random((5, 2)), "coincide"),
        (scrfd.TEMPLATE[::-1] * [[1, 0.1]], "do not lie as on a face"),
        (scrfd.TEMPLATE[[2, 4, 0, 1, 3]], "do not lie as on a face"),
    ],
)
def test_points_that_are_no_face_are_refused(points, says):
    with pytest.raises(face_models.FaceError, match=says):
        align(Image.new("RGB", (200, 200)), points)


def test_a_face_in_profile_is_aligned():
    squeezed = (scrfd.TEMPLATE - 56) * [[0.35, 1]] + 100
    assert align(Image.new("RGB", (200, 200)), squeezed).shape == (112, 112, 3)


def test_degenerate_points_of_a_detector_name_the_picture(make, tmp_path):
    box, points, score = scrfd.face(300, 300, 100)
    for wrong in (points * np.nan, points * 0 + 300):
        finder = make([(box, wrong, score)])
        picture = save(tmp_path, Image.new("RGB", (640, 640), "red"))
        with pytest.raises(face_models.FaceError, match=r"photo\.png: the five points of the face"):
            finder.look(picture)


# --- looking twice --------------------------------------------------------------------------------


class Model:
    """Stands for insightface's SCRFD: `see(pixels RGB, number of the look)` -> faces, or raises."""

    static_input_size = None

    def __init__(self, see):
        self.see, self.looks = see, 0

    def detect(self, pixels, input_size, det_thresh):
        self.looks += 1
        found = self.see(pixels[:, :, ::-1], self.looks)
        boxes = [np.append(box, score) for box, _, score in found]
        points = [five for _, five, _ in found]
        return np.float32(boxes).reshape(-1, 5), np.float32(points).reshape(-1, 5, 2)


def finder_that(see):
    return finding.Finder(None, face_models.Detector(Model(see), Path("d.onnx"), "0" * 64, "cpu"))


def sees_discs(pixels, look):
    """Finds the face of `dotted`: points askew unless it is upright and large, as detectors do."""
    points = dots(pixels)
    across = points[1] - points[0]
    turned = np.degrees(np.arctan2(across[1], across[0]))
    if abs(turned) > 12 or np.hypot(*across) < 30:
        points = points + 0.12 * np.hypot(*across) * np.array(
            [[1, 0], [-1, 1], [0, -1], [1, 1], [-1, 0]]
        )
        score = 0.5
    else:
        score = 0.75
    box = np.concatenate([points.min(axis=0), points.max(axis=0)])
    return [(box, points, score)]


@pytest.mark.parametrize(
    ("angle", "scale", "middle"),
    [
        (25, 1.0, (350, 300)),
        (-40, 2.4, (350, 300)),
        (0, 0.25, (600, 90)),
        (100, 1.0, (350, 300)),
        (-30, 1.0, (60, 540)),  # the square reaches beyond the picture
        (35, 4.4, (350, 300)),  # it is larger than the picture, and made smaller
    ],
)
def test_second_look_places_the_points_of_a_turned_or_small_face(angle, scale, middle):
    turn = scrfd.similarity(angle, scale, (0, 0))
    image, true = dotted(scrfd.similarity(angle, scale, middle - scrfd.apply(turn, [[56, 56]])[0]))
    finder = finder_that(sees_discs)
    (first,) = finding.detect(finder.detector, image)
    across = np.linalg.norm(true[1] - true[0])
    assert np.linalg.norm(first.points - true, axis=1).min() > 0.1 * across
    finder.detector.model.looks = 0
    sight = finder.look_at(image, "the picture")
    assert finder.detector.model.looks >= 3  # twice, and at the picture turned
    np.testing.assert_allclose(sight.points, true, atol=0.02 * across)
    assert sight.score == 0.75  # the second look's
    # The box is that of the oval around the points, which is no larger when it is turned.
    centre = (sight.box[:2] + sight.box[2:]) / 2
    assert np.linalg.norm(centre - true.mean(axis=0)) < 0.2 * across
    assert (sight.box[2:] - sight.box[:2] < 1.25 * across).all()
    # The crop is taken from the picture itself, by the better points.
    pixels = np.ascontiguousarray(align(image, sight.points))
    assert sight.crop_sha256 == hashlib.sha256(pixels.tobytes()).hexdigest()
    np.testing.assert_allclose(dots(pixels), scrfd.TEMPLATE, atol=1)


def raises(*_):
    raise RuntimeError("a shape that it cannot process")


MIDDLE, THERE = (
    319.5,
    640 / finding.LOOK_SIDE,
)  # of the square, and the side of the face's crop in it


@pytest.mark.parametrize(
    "again",
    [
        lambda *_: [],
        lambda *_: [scrfd.face(MIDDLE + 0.4 * THERE, MIDDLE, THERE)],  # somebody else
        lambda *_: [scrfd.face(MIDDLE, MIDDLE, THERE / 2)],
        lambda *_: [scrfd.face(MIDDLE, MIDDLE, THERE * 2)],
        lambda *_: [(*scrfd.face(MIDDLE, MIDDLE, THERE)[:1], np.full((5, 2), MIDDLE), 0.9)],
        lambda *_: [(*scrfd.face(MIDDLE, MIDDLE, THERE)[:1], np.full((5, 2), np.nan), 0.9)],
        raises,
    ],
)
def test_first_look_stands_where_the_second_sees_nothing_or_somebody_else(again):
    one = scrfd.face(300, 200, 80, 0.6, angle=30)
    looks = {1: lambda *_: [one], 2: again}  # the third is at the picture turned over
    finder = finder_that(lambda pixels, look: looks.get(look, lambda *_: [])(pixels, look))
    sight = finder.look_at(Image.new("RGB", (640, 640)), "the picture")
    assert finder.detector.model.looks >= 3
    np.testing.assert_allclose(sight.points, one[1], atol=1e-3)
    np.testing.assert_allclose(sight.box, one[0], atol=1e-3)
    assert sight.score == pytest.approx(0.6)


def test_second_look_keeps_to_the_face_that_was_chosen():
    """Of several in the square it is the nearest, and not the largest or the surest."""

    def see(_, look):
        if look == 1:
            return [scrfd.face(200, 200, 80), scrfd.face(290, 200, 90)]
        near, other = MIDDLE + 0.05 * THERE, MIDDLE + 0.28 * THERE
        return [
            scrfd.face(near, MIDDLE, THERE, 0.6),
            scrfd.face(other, MIDDLE, 1.4 * THERE, 0.99),
        ]

    finder = dataclasses.replace(finder_that(see), select="left")
    sight = finder.look_at(Image.new("RGB", (640, 640)), "the picture")
    # `scrfd.face` has its middle at 56 of the 112 pixels, and the crop at 55.5.
    half = 0.5 * 80 / 112
    expected = scrfd.face(200 + 0.05 * 80 - half, 200 - half, 80)[1]
    np.testing.assert_allclose(sight.points, expected, atol=0.05)


# --- pictures on their side -----------------------------------------------------------------------

WHOLE = (360, 300)


def sees_upright_only(degrees, sure=0.9, unsure=0.6):
    """As real detectors do: of a face that is not upright, it has points that are nearly upright,
    upside down without a sign of it, and on its side with a roll over 45 degrees."""

    def see(pixels, look):
        points = dots(pixels)
        box = np.concatenate([points.min(axis=0), points.max(axis=0)])
        across = points[1] - points[0]
        turned = np.degrees(np.arctan2(across[1], across[0]))
        if abs(turned) < 40:
            return [(box, points, sure)]
        if degrees is not None and abs(turned) < 140:
            return []
        middle, side = points.mean(axis=0), 112 / 36 * np.hypot(*across)
        wrong = 0 if abs(turned) > 140 else np.sign(turned) * 55
        matrix = scrfd.similarity(wrong, side / 112, (0, 0))
        five = scrfd.apply(matrix, scrfd.TEMPLATE - scrfd.TEMPLATE.mean(axis=0)) + middle
        return [(box, five, unsure)]

    return see


@pytest.mark.parametrize(
    ("turn", "hidden"),
    [(90, None), (180, None), (270, None), (90, "not seen on its side")],
)
def test_a_picture_that_lies_on_its_side_gives_the_face_of_the_upright_one(turn, hidden, caplog):
    caplog.set_level("INFO")
    image, true = dotted(scrfd.similarity(10, 1.2, (110, 90)), WHOLE)
    turned = image.transpose(getattr(Image.Transpose, f"ROTATE_{turn}"))
    upright = finder_that(sees_upright_only(hidden)).look_at(image, "upright")
    assert caplog.text == ""
    sight = finder_that(sees_upright_only(hidden)).look_at(turned, "on its side")
    assert "on its side: the face is turned by" in caplog.text
    back = turned_back(sight.points, turn, WHOLE)
    np.testing.assert_allclose(back, true, atol=2)
    np.testing.assert_allclose(back, upright.points, atol=1.5)
    crops = [align(image, upright.points), align(turned, sight.points)]
    assert np.abs(crops[0].astype(float) - crops[1]).mean() < 4


def test_turned_back_is_the_inverse_of_pillows_turns():
    pixels = np.zeros((5, 9), np.uint8)
    pixels[1, 7] = 255
    for turn in (90, 180, 270):
        turned = Image.fromarray(pixels).transpose(getattr(Image.Transpose, f"ROTATE_{turn}"))
        y, x = np.argwhere(np.asarray(turned))[0]
        assert turned_back(np.array([[x, y]]), turn, (9, 5)).tolist() == [[7, 1]]


def test_a_picture_stays_as_it_is_unless_turned_over_it_is_clearly_surer():
    """An upright face of which the detector is nearly as sure the wrong way round."""
    image, true = dotted(scrfd.similarity(0, 1.2, (110, 90)), WHOLE)
    finder = finder_that(sees_upright_only(None, sure=0.9, unsure=0.92))
    np.testing.assert_allclose(finder.look_at(image, "upright").points, true, atol=2)


def test_a_tiny_face_has_a_notice_with_its_size(caplog):
    caplog.set_level("INFO")
    for side, said in ((20, True), (60, False)):
        caplog.clear()
        finder = finder_that(lambda pixels, look, side=side: [scrfd.face(300, 200, side)])
        finder.look_at(Image.new("RGB", (640, 640)), "the picture")
        assert ("is tiny" in caplog.text) == said
        assert ("is 20 pixels wide" in caplog.text) == said
        caplog.clear()
        dataclasses.replace(finder, is_quiet=True).look_at(Image.new("RGB", (640, 640)), "it")
        assert caplog.text == ""


def test_ordinary_pictures_of_the_mini_are_not_tiny_for_its_recogniser(caplog):
    caplog.set_level("INFO")
    finder = finding.open_finder(hub.MINI_FOLDER / "face" / "recogniser.onnx")
    ((photo, others, _), *_) = strangers.draw_people("test", [0], 1)
    for picture in [*photo, *others[:3]]:
        finder.look_at(Image.fromarray(picture), "a picture")
    assert "is tiny" not in caplog.text
    finder.look_at(Image.fromarray(photo[0]).resize((28, 28)), "a smaller one")
    assert "is tiny" in caplog.text


# --- trying harder --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "detector", "says"),
    [
        (0.9, {}, None),
        (0.9, {"only_with_corner": GREY}, "detection size 640, threshold 0.5, border 0.5"),
        (0.9, {"only_up_to": 320, "size": 320}, "detection size 320, threshold 0.5, border 0.5"),
        (0.9, {"only_up_to": 160, "size": 160}, "detection size 160, threshold 0.5, border 0.5"),
        (0.4, {}, "detection size 640, threshold 0.3, border 0"),
        (
            0.4,
            {"only_up_to": 320, "only_with_corner": GREY, "size": 320},
            "detection size 320, threshold 0.3, border 0.5",
        ),
    ],
)
def test_a_face_that_is_hard_to_find(make, tmp_path, caplog, score, detector, says):
    """Border first, then smaller sizes, then a lower threshold; found where it is in the photo."""
    caplog.set_level("INFO")
    width, height = 400, 300
    size = detector.get("size", 640)
    bordered = says is not None and says.endswith("border 0.5")
    zoom = size / (800 if bordered else 400)
    offset = 200 if bordered else 0
    place = np.array([250, 120])
    finder = make([scrfd.face(*((place + offset) * zoom), 90 * zoom, score)], **detector)
    sight = finder.look(save(tmp_path, Image.new("RGB", (width, height), "navy")))
    np.testing.assert_allclose(sight.box, [214, 84, 286, 156], atol=0.5)
    np.testing.assert_allclose(
        sight.points, (scrfd.TEMPLATE - 56) * 90 / 112 + place[None], atol=0.5
    )
    assert (says or "only with") in caplog.text if says else "only with" not in caplog.text


def test_no_face_names_the_picture_and_the_way_out(make, tmp_path):
    picture = save(tmp_path, Image.new("RGB", (64, 48)), "wall.png")
    for found in ([], [scrfd.face(320, 320, 100, score=0.2)]):
        with pytest.raises(
            face_models.FaceError, match=r"wall\.png \(64 x 48 .*--pre_a"
        ) as refused:
            make(found).look(picture)
        assert refused.value.plain.endswith("take a photo with a larger, clearer face")


def test_a_picture_that_is_too_thin_for_the_detector_is_found_with_a_border(make, tmp_path):
    """Shrunk to one pixel of width, it has none left in the detector's input."""
    picture = save(tmp_path, Image.new("RGB", (16, 14000), "navy"), "thin.png")
    sight = make([scrfd.face(320, 320, 100)], only_with_corner=GREY).look(picture)
    assert sight.score == pytest.approx(0.9)
    with pytest.raises(face_models.FaceError, match=r"no face found in .*thin\.png"):
        make([]).look(picture)


def test_a_detector_that_cannot_be_used_on_any_picture(make, tmp_path):
    """As of a file with nine outputs that is no SCRFD: its rows are not those of anchors."""
    finder = make([scrfd.face(320, 320, 100)])
    finder.detector.model._num_anchors = 3
    picture = save(tmp_path, Image.new("RGB", (64, 48)))
    says = r"photo\.png: the detector .*det\.onnx cannot process a picture of 64 x 48"
    with pytest.raises(face_models.FaceError, match=says):
        finder.look(picture)


# --- several faces --------------------------------------------------------------------------------

THREE = [scrfd.face(100, 300, 60), scrfd.face(330, 310, 80, 0.8), scrfd.face(500, 200, 120, 0.7)]


@pytest.mark.parametrize(
    ("select", "x"),
    [("largest", 500), ("center", 330), ("left", 100), ("right", 500), ("0", 100), ("1", 330)],
)
def test_one_of_three_faces_is_chosen(make, tmp_path, caplog, select, x):
    caplog.set_level("INFO")
    sight = make(THREE, select=select).look(save(tmp_path, Image.new("RGB", (640, 640))))
    assert (sight.box[0] + sight.box[2]) / 2 == pytest.approx(x, abs=0.5)
    assert f"3 faces; taken is number {[100, 330, 500].index(x)} from the left" in caplog.text


def test_a_single_face_needs_no_notice(make, tmp_path, caplog):
    caplog.set_level("INFO")
    make(THREE[:1]).look(save(tmp_path, Image.new("RGB", (640, 640))))
    assert "from the left" not in caplog.text


def test_a_choice_that_is_none(make, tmp_path):
    picture = save(tmp_path, Image.new("RGB", (640, 640)))
    with pytest.raises(face_models.FaceError, match=r"photo\.png has no face 3: .*0 to 2"):
        make(THREE, select="3").look(picture)
    for select in ("biggest", "-1", "", "1.5", "²"):
        with pytest.raises(
            face_models.FaceError, match="largest, center, left, right, or a number"
        ):
            make(THREE, select=select)


# --- pictures of every kind -----------------------------------------------------------------------


def test_every_kind_of_picture_gives_the_face_of_the_plain_one(make, tmp_path):
    finder = make([scrfd.face(300, 200, 150)])
    smooth = np.asarray(Image.effect_noise((8, 6), 90).resize((80, 60), Image.Resampling.BICUBIC))
    grey = Image.fromarray(smooth).resize((640, 480), Image.Resampling.BICUBIC)
    plain = finder.look(save(tmp_path, grey.convert("RGB"), "plain.png"))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    second = Image.new("RGB", grey.size, "red")
    pictures = [
        save(tmp_path, grey, "grey.png"),
        save(tmp_path, deep, "deep.png"),
        save(tmp_path, grey.convert("RGB"), "lossless.webp", lossless=True),
        save(tmp_path, grey.convert("RGB"), "moving.png", save_all=True, append_images=[second]),
    ]
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> its inverse in Pillow
    for orientation, transpose in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = grey.convert("RGB").transpose(Image.Transpose(transpose))
        pictures.append(save(tmp_path, turned, f"exif{orientation}.png", exif=exif))
    for picture in pictures:
        sight = finder.look(picture)
        np.testing.assert_allclose(sight.box, plain.box, err_msg=picture.name)
        assert sight.crop_sha256 == plain.crop_sha256, picture.name
    cmyk = finder.look(save(tmp_path, grey.convert("CMYK"), "cmyk.jpg", quality=95))
    assert cmyk.embed @ plain.embed > 0.98


def test_8000_by_8000(make, tmp_path):
    """Found with a border, which must not be put around all 64 megapixels."""
    finder = make([scrfd.face(320, 320, 40)], only_with_corner=GREY)
    detect, shapes = finder.detector.model.detect, []

    def noted(pixels, **settings):
        shapes.append(pixels.shape)
        return detect(pixels, **settings)

    finder.detector.model.detect = noted
    sight = finder.look(save(tmp_path, Image.new("RGB", (8000, 8000), "navy")))
    # The last two: a second look, and one at the picture turned over.
    assert shapes == [(1280, 1280, 3), (2560, 2560, 3), (640, 640, 3), (1280, 1280, 3)]
    np.testing.assert_allclose(sight.box, [3600, 3600, 4400, 4400], rtol=2e-3)


def test_a_detector_of_one_fixed_size_is_given_no_more_than_twice_that(make, tmp_path):
    finder = make([scrfd.face(160, 100, 40)], size=320)
    model, shapes = finder.detector.model, []
    model.static_input_size = (320, 320)
    detect = model.detect
    model.detect = lambda pixels, **settings: (
        shapes.append(pixels.shape) or detect(pixels, **settings)
    )
    sight = finder.look(save(tmp_path, Image.new("RGB", (1600, 1200), "navy")))
    # The second: the face cut out. The third: the picture turned over.
    assert shapes == [(480, 640, 3), (320, 320, 3), (480, 640, 3)]
    np.testing.assert_allclose(sight.box, [720, 420, 880, 580], rtol=2e-3)


@pytest.mark.parametrize(("share", "border"), [(0.5, 0.5), (0.25, 1.5), (0.125, 3.5)])
def test_a_detector_of_one_fixed_size_sees_a_smaller_face_within_a_wider_border(
    make, tmp_path, caplog, share, border
):
    """It answers once the picture takes up no more than a share of its input."""
    caplog.set_level("INFO")
    place = (0.5 + share * (np.array([250, 120]) / 400 - 0.5)) * 640
    finder = make([scrfd.face(*place, 90 * 1.6 * share)], fixed=True)
    model, shares, sides = finder.detector.model, [], []
    detect = model.detect

    def seen(pixels, **settings):
        sides.append(max(pixels.shape))
        shares.append((pixels != 127).any(axis=(0, 2)).mean())
        if shares[-1] > share + 0.01:
            return np.zeros((0, 5), np.float32), np.zeros((0, 5, 2), np.float32)
        return detect(pixels, **settings)

    model.detect = seen
    # Of four megapixels, which must not be put into the border as they are.
    sight = finder.look(save(tmp_path, Image.new("RGB", (2000, 2000), "navy")))
    assert model.static_input_size == (640, 640)
    # The last two: the second look, at a square inside the picture, and the picture turned over.
    *tried, again, _ = shares
    np.testing.assert_allclose(tried, [1, 0.5, 0.25, 0.125][: len(tried)], atol=0.01)
    assert again == 1
    assert max(sides) <= 4 * 640
    assert f"detection size 640, threshold 0.5, border {border}; see" in caplog.text
    np.testing.assert_allclose(sight.box / 5, [214, 84, 286, 156], atol=1)


def test_a_face_at_the_border(make, tmp_path):
    """What lies beyond the edge is black in the crop, and the training square stays inside."""
    finder = make([scrfd.face(10, 630, 100)])
    picture = save(tmp_path, Image.new("RGB", (640, 640), "white"))
    sight = finder.look(picture)
    assert sight.box[0] < 0 and sight.box[3] > 640
    crop = align(picture.read(), sight.points)
    assert (crop[:20, 80:] == 255).all() and (crop[:, :30] == 0).all()
    assert (crop[90:] == 0).all()
    (x, y), side, angle = training_square(sight.points, (640, 640))
    assert (x - side / 2, y + side / 2) == pytest.approx((0, 640), abs=1) and side < 640
    assert abs(angle) < 0.01


# --- the square to train on -----------------------------------------------------------------------


# Eyes 100 apart and the mouth 110 below.
EYES_AND_MOUTH = np.array([[450, 400], [550, 400], [500, 450], [460, 510], [540, 510]], np.float32)


def test_training_square_has_the_proportions_of_ffhq():
    """The side is 400, the centre 11 below the eyes."""
    square = training_square
    points = EYES_AND_MOUTH
    assert square(points, (1000, 1000)) == ((500, 411), 400, 0)
    assert square(points, (1000, 500)) == ((500, 300), 400, 0)  # moved up
    assert square(points, (480, 2000)) == ((280, 411), 400, 0)  # moved to the left
    assert square(points, (600, 350)) == ((425, 175), 350, 0)  # made smaller
    taller = points + np.array([[0, 0], [0, 0], [0, 0], [0, 90], [0, 90]], np.float32)
    assert square(taller, (2000, 2000))[1] == 720
    assert square(points, (1000, 1000), 1.25) == ((500, 411), 500, 0)
    assert square(points, (1000, 1000), 3.0) == ((500, 500), 1000, 0)  # all there is


@pytest.mark.parametrize("degrees", [-100, -35, 10, 60, 170])
def test_training_square_turns_with_the_face(degrees):
    turn = scrfd.similarity(degrees, 1.0, (0, 0))
    turn[:, 2] = 500 - turn[:, :2] @ (500, 411)
    points = scrfd.apply(turn, EYES_AND_MOUTH)
    centre, side, angle = training_square(points, (1000, 1000))
    np.testing.assert_allclose(centre, (500, 500), atol=1e-3)
    assert (side, np.degrees(angle)) == (400, pytest.approx(degrees, abs=1e-3))
    # Where there is less room it stays inside, all corners of it.
    for size in ((600, 1000), (1000, 580), (500, 620)):
        centre, side, angle = training_square(points, size)
        corners = scrfd.apply(
            scrfd.similarity(np.degrees(angle), side / 2, centre),
            [[-1, -1], [1, -1], [1, 1], [-1, 1]],
        )
        assert (corners > -1e-6).all() and (corners < np.array(size) + 1e-6).all()
        assert side == 400 or side > min(size) / 1.42 - 1


def test_crop_of_a_turned_picture_is_that_of_the_straight_one():
    """As Pillow turns pictures itself; an upright crop takes the pixels as they are."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8))
    image = noise.resize((600, 500), Image.Resampling.BICUBIC)
    straight = np.asarray(images.crop_turned(image, (310, 220), 200, 0.0))
    np.testing.assert_array_equal(straight, np.asarray(image)[120:320, 210:410])
    turned = image.rotate(-25, Image.Resampling.BICUBIC, center=(310, 220))  # clockwise
    again = images.crop_turned(turned, (310, 220), 200, np.radians(25))
    assert np.abs(np.asarray(again).astype(int) - straight).mean() < 1


# --- several photos -------------------------------------------------------------------------------


def photos_of_one(count, spread, seed=0):
    rng = np.random.default_rng(seed)
    rows = np.eye(1, 512) + rng.normal(0, spread / 512**0.5, (count, 512))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_photos_unlike_the_others_are_found():
    for count in (3, 4, 12):
        own = photos_of_one(count, 0.8)
        unlike, similarities = embedding.unlike(own)
        assert not unlike.any()
        np.testing.assert_allclose(similarities, own @ embedding.mean_embedding(own), rtol=1e-5)
        stranger = np.eye(1, 512, 7, dtype=np.float32)
        unlike, _ = embedding.unlike(np.concatenate([own, stranger]))
        assert unlike.tolist() == [False] * count + [True]
    # Photos that are all alike are not told apart by a little noise in one of them.
    alike = np.concatenate([photos_of_one(9, 0.01), photos_of_one(1, 0.2, seed=1)])
    assert not embedding.unlike(alike)[0].any()
    for few in (np.eye(1, 512, dtype=np.float32), np.eye(2, 512, dtype=np.float32)):
        assert not embedding.unlike(few)[0].any()  # of two, nobody can tell which


# --- where the models run -------------------------------------------------------------------------


def test_cuda_that_is_not_there_is_refused(make, monkeypatch):
    import onnxruntime

    path = make(THREE).recogniser.path
    for load, file in (
        (face_models.load_recogniser, path),
        (face_models.load_detector, path.with_name("det.onnx")),
    ):
        with pytest.raises(
            face_models.FaceError, match=r"--face_provider cuda: CUDA.*built without it"
        ):
            load(file, "cuda")
    # Built with CUDA, but its libraries do not load: onnxruntime only warns.
    real = onnxruntime.get_available_providers()
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", *real]
    )
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(face_models.FaceError, match=r"fell back to CPUExec.*--face_provider cpu"),
    ):
        face_models.load_recogniser(path, "cuda")


def test_a_model_that_is_no_detector(make, tmp_path):
    finder = make(THREE)
    with pytest.raises(face_models.FaceError, match="not an SCRFD face detector .* got input"):
        face_models.load_detector(finder.recogniser.path)
    scrfd.write_detector(tmp_path / "boxes.onnx", THREE, points=False)
    with pytest.raises(face_models.FaceError, match="five points per face"):
        face_models.load_detector(tmp_path / "boxes.onnx")
    assert packs.find_in_pack(tmp_path, "detection").name == "boxes.onnx"
