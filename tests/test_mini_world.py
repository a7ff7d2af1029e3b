"""The drawn world: pictures say what was asked for, and different people look different."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idea_jax.mini import face, sheet, traits, world

COUNT = 24
FEW = 6


def repeat(tree, count=COUNT):
    return jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * count), tree)


@pytest.fixture(scope="module")
def people():
    return jax.vmap(traits.random_identity)(jax.random.split(jax.random.key(0), COUNT))


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(1), COUNT)


def draw(people, keys, **scene):
    # The same pose on purpose: clone tells the check for keys used twice.
    scenes = repeat(traits.make_scene(**scene))
    return np.asarray(world.draw_many(people, scenes, jax.random.clone(keys)))


def test_picture_depends_on_its_arguments_alone(people, keys):
    first = draw(people, keys)
    assert first.shape == (COUNT, 64, 64, 3) and first.dtype == np.float32
    assert first.min() >= -1 and first.max() <= 1
    np.testing.assert_array_equal(draw(people, keys), first)
    one = jax.tree.map(lambda leaf: leaf[3], people)
    alone = jax.jit(world.draw, static_argnames="size")(
        one, traits.make_scene(), jax.random.clone(keys)[3], size=64
    )
    np.testing.assert_allclose(alone, first[3], atol=1e-4)


def test_larger_picture_is_the_same_picture(people, keys):
    scenes = repeat(traits.make_scene(hat="cap", expression="smiling"))
    small, large = (
        np.asarray(world.draw_many(people, scenes, jax.random.clone(keys), size=size))
        for size in (64, 256)
    )
    shrunk = large.reshape(COUNT, 64, 4, 64, 4, 3).mean((2, 4))
    assert np.abs(shrunk - small).mean() < 0.02


@pytest.mark.parametrize("colour", traits.COLOURS)
def test_background_and_shirt_have_the_colour_asked_for(people, keys, colour):
    other = "green" if colour != "green" else "red"
    asked = 2 * np.asarray(face.cloth(traits.COLOURS.index(colour))) - 1
    cloths = np.stack([np.asarray(face.cloth(i)) for i in range(len(traits.COLOURS))]) * 2 - 1
    corner = draw(people, keys, background=colour, shirt=other)[:, 2:8, 2:8].mean((0, 1, 2))
    # The corner is lit, so the nearest of the named colours is what counts, not equality.
    assert np.abs(cloths - corner).sum(1).argmin() == traits.COLOURS.index(colour)
    assert np.abs(corner - asked).max() < 0.35
    shirts = draw(people, keys, background=other, shirt=colour)[:, 61:, 28:36]
    assert np.abs(cloths - np.median(shirts, (0, 1, 2))).sum(1).argmin() == traits.COLOURS.index(
        colour
    )


def changed(a, b):
    """Rows of the picture (top to bottom) that differ, averaged over people."""
    return np.abs(a - b).mean((0, 2, 3))


def test_hat_changes_the_top_and_expression_the_face(people, keys):
    plain = draw(people, keys)
    for hat in traits.HATS[1:]:
        rows = changed(plain, draw(people, keys, hat=hat))
        assert rows[4:24].mean() > 20 * rows[56:].mean()
    for expression in traits.EXPRESSIONS[1:]:
        rows = changed(plain, draw(people, keys, expression=expression))
        assert rows[20:56].sum() > 0.9 * rows.sum() and rows.sum() > 0.1


def test_styles_differ_and_people_stay_apart_in_each(people, keys):
    pictures = {style: draw(people, keys, style=style) for style in traits.STYLES}
    for style, drawn in pictures.items():
        if style != "photo":
            assert np.abs(drawn - pictures["photo"]).mean() > 0.05
        apart = np.abs(drawn[:, None] - drawn[None]).mean((2, 3, 4))
        assert apart[~np.eye(COUNT, dtype=bool)].min() > 0.03


def test_pose_moves_the_picture_less_than_another_person_does(people, keys):
    other_keys = jax.random.split(jax.random.key(2), COUNT)
    pose = np.abs(draw(people, keys) - draw(people, other_keys)).mean()
    swapped = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), people)
    person = np.abs(draw(people, keys) - draw(swapped, keys)).mean()
    assert 0.005 < pose < person


def test_pair_shows_both(people, keys):
    left, right = (jax.tree.map(lambda leaf, i=i: leaf[i], people) for i in (0, 1))
    scenes = [traits.make_scene(shirt=shirt, background="white") for shirt in ("red", "blue")]
    pair = jax.jit(world.draw_pair, static_argnames="size")
    picture = np.asarray(pair(left, right, *scenes, jax.random.key(5), size=64))
    red, blue = picture[60:, 16], picture[60:, 48]
    assert (red[:, 0] > red[:, 2]).all() and (blue[:, 2] > blue[:, 0]).all()


# Landmarks


@pytest.fixture(scope="module")
def few(people, keys):
    return jax.tree.map(lambda leaf: leaf[:FEW], people), jax.random.clone(keys)[:FEW]


def landmarks(people, scenes, keys, size=64):
    marks = jax.vmap(lambda *args: world.landmarks(*args, size=size))
    return np.asarray(marks(people, scenes, jax.random.clone(keys)))


def changed_by(people, keys, scene, size, **traits_):
    """float[N, size, size]: where people of other traits look different."""
    people = people._replace(glasses=jnp.zeros_like(people.glasses))
    people = people._replace(beard=jnp.zeros_like(people.beard))
    pictures = [
        np.asarray(world.draw_many(them, repeat(scene, FEW), jax.random.clone(keys), size=size))
        for them in (people, people._replace(**traits_))
    ]
    return np.abs(pictures[0] - pictures[1]).sum(-1)


def test_eyes_of_landmarks_are_where_the_irises_are(few):
    people, keys = few
    size, scene = 128, traits.make_scene(expression="surprised")
    other = (people.eye_colour + 1) % len(traits.EYE_COLOURS)
    weights = changed_by(people, keys, scene, size, eye_colour=other)
    points = landmarks(people, repeat(scene, FEW), keys, size)
    rows, columns = np.mgrid[:size, :size]
    middle = points[:, :2, 0].mean(1)
    eye_distance = np.linalg.norm(points[:, 1] - points[:, 0], axis=1)
    for side in (0, 1):
        on_side = (columns > middle[:, None, None]) == side
        w = weights * on_side
        iris = np.stack([(w * at).sum((1, 2)) / w.sum((1, 2)) for at in (columns, rows)], axis=-1)
        # They look aside by up to a twelfth of the eyes' distance, up and down not at all.
        off = np.abs(iris - points[:, side]) / eye_distance[:, None]
        assert off[:, 0].max() < 0.09 and off[:, 1].max() < 0.05


@pytest.mark.parametrize("expression", traits.EXPRESSIONS)
def test_corners_of_the_mouth_are_where_the_lips_end(few, expression):
    people, keys = few
    size, scene = 128, traits.make_scene(expression=expression)
    fullness = people.mouth_fullness
    lips = changed_by(people, keys, scene, size, mouth_fullness=jnp.where(fullness > 0, -1.0, 1.0))
    points = landmarks(people, repeat(scene, FEW), keys, size)
    pixel = np.linalg.norm(points[:, 1] - points[:, 0], axis=1)[:, None] / 35  # of ArcFace's crop
    for i in range(FEW):
        rows, columns = np.nonzero(lips[i] > 0.02)
        ends = [columns.min(), columns.max()]
        assert np.abs(points[i, 3:, 0] - ends).max() < 2.5 * pixel[i]
        for end, corner in zip(ends, points[i, 3:], strict=True):
            # Those of a smile are about 6 above those of a sad mouth.
            assert abs(rows[columns == end].mean() - corner[1]) < 5 * pixel[i]


def test_tip_of_the_nose_is_where_its_width_shows(few):
    people, keys = few
    size, scene = 128, traits.make_scene()
    weights = changed_by(people, keys, scene, size, nose_width=-people.nose_width)
    points = landmarks(people, repeat(scene, FEW), keys, size)
    rows, columns = np.mgrid[:size, :size]
    centre = np.stack(
        [(weights * at).sum((1, 2)) / weights.sum((1, 2)) for at in (columns, rows)], axis=-1
    )
    eye_distance = np.linalg.norm(points[:, 1] - points[:, 0], axis=1)
    assert (np.linalg.norm(centre - points[:, 2], axis=1) / eye_distance).max() < 0.12


def test_landmarks_turn_shift_and_mirror_with_the_head(people):
    who = jax.tree.map(lambda leaf: leaf[0], people)
    scene = traits.make_scene(expression="smiling")
    still = traits.Nuisance(*(jnp.float32(0),) * len(traits.Nuisance._fields))

    def at(size=64, **nuisance):
        nuisance = still._replace(**{name: jnp.float32(x) for name, x in nuisance.items()})
        return np.asarray(world.locate((who,), (scene,), (nuisance,), size))[0]

    straight = at()
    np.testing.assert_allclose(at(size=256) + 0.5, 4 * (straight + 0.5), atol=1e-3)
    assert (np.diff(straight[:2, 0]) > 0).all() and (np.diff(straight[3:, 0]) > 0).all()
    np.testing.assert_allclose(straight[[1, 0, 2, 4, 3]] * [-1, 1] + [63, 0], straight, atol=1e-3)
    # The head tilts to the right by 0.1 about the top of the neck.
    neck = np.array([31.5, 32 * (1 + 0.10 + 0.96 * 0.45) - 0.5])
    cos, sin = np.cos(0.1), np.sin(0.1)
    turned = (straight - neck) @ np.array([[cos, sin], [-sin, cos]]) + neck
    np.testing.assert_allclose(at(rotation=1), turned, atol=1e-3)
    moved = straight + 32 * 0.96 * np.array([0.055, -0.045])
    np.testing.assert_allclose(at(shift_x=1, shift_y=-1), moved, atol=1e-3)
    left, right = at(turn=-1), at(turn=1)
    np.testing.assert_allclose(left[[1, 0, 2, 4, 3]] * [-1, 1] + [63, 0], right, atol=1e-3)
    assert right[2, 0] - right[:2, 0].mean() > 1  # the nose goes further than the eyes


def test_a_view_shows_the_usual_picture_in_a_larger_one(few):
    """Sampled where it lies: the same picture, and the same landmarks on it."""
    people, keys = few
    who, scene = jax.tree.map(lambda leaf: leaf[0], people), traits.make_scene()
    usual, larger = world.View(), world.View(0.5, np.radians(30), 0.2, -0.1)
    draw = jax.jit(world.draw, static_argnames="size")
    small, large = (
        np.asarray(draw(who, scene, jax.random.clone(keys)[0], size=size, view=view))
        for size, view in ((64, usual), (256, larger))
    )
    cos, sin = np.cos(larger.angle), np.sin(larger.angle)
    turn = larger.zoom * np.array([[cos, -sin], [sin, cos]])
    rows, columns = np.mgrid[:64, :64]
    places = (np.stack([columns, rows], -1) + 0.5) / 32 - 1
    there = places @ turn.T + (larger.x, larger.y)
    at = ((there + 1) * 128 - 0.5).round().astype(int)
    found = large[at[..., 1], at[..., 0]]
    assert np.abs(found - small).mean() < 0.04 < 0.2 < small.std()
    points, moved = (
        np.asarray(world.landmarks(who, scene, jax.random.clone(keys)[0], size=size, view=view))
        for size, view in ((64, None), (256, larger))
    )
    expected = ((((points + 0.5) / 32 - 1) @ turn.T + (larger.x, larger.y)) + 1) * 128 - 0.5
    np.testing.assert_allclose(moved, expected, atol=1e-2)


def test_landmarks_of_a_pair_are_those_of_both(few):
    people, keys = few
    left, right = (jax.tree.map(lambda leaf, i=i: leaf[i], people) for i in (0, 1))
    scenes = traits.make_scene(), traits.make_scene(expression="sad")
    points = np.asarray(world.landmarks_of_pair(left, right, *scenes, jax.random.key(5)))
    assert points.shape == (2, 5, 2)
    assert points[0, :, 0].max() < 32 < points[1, :, 0].min()
    alone = landmarks(people, repeat(scenes[0], FEW), keys)[0]
    sizes = [np.linalg.norm(p[1] - p[0]) for p in (points[0], alone)]
    assert sizes[0] / sizes[1] == pytest.approx(0.60 / 0.96, rel=0.13)


def test_kinds_occur_with_their_shares_and_traits_evenly():
    drawn = jax.vmap(traits.random_identity)(jax.random.split(jax.random.key(0), 6000))
    for name, values in drawn._asdict().items():
        if name in traits.KINDS:
            shares = traits.KINDS[name] / traits.KINDS[name].sum()
            counts = np.bincount(np.asarray(values), minlength=len(shares)) / 6000
            np.testing.assert_allclose(counts, shares, atol=0.03)
        else:
            np.testing.assert_allclose(
                np.quantile(values, [0.01, 0.5, 0.99]), [-0.98, 0, 0.98], atol=0.06
            )


def test_first_and_last_name_share_the_traits(people):
    code = np.random.default_rng(0).uniform(size=(2, traits.CODE_SIZE)).astype(np.float32)
    person = traits.identity_from_code(code)
    for row, fields in enumerate(np.split(np.array(traits.Traits._fields), 2)):
        other = code.copy()
        other[row] = 1 - other[row]
        relative = traits.identity_from_code(other)
        changed = {f for f in person._fields if getattr(person, f) != getattr(relative, f)}
        assert changed <= set(fields.tolist()) and len(changed) > 8
    assert traits.distance(person, person) == 0
    apart = traits.distance(
        jax.tree.map(lambda leaf: np.asarray(leaf)[:, None], people),
        jax.tree.map(lambda leaf: np.asarray(leaf)[None], people),
    )
    assert apart[~np.eye(COUNT, dtype=bool)].min() > 0.2 and apart.max() <= 1


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="no hat 'crown': expected one of none, cap"):
        traits.make_scene(hat="crown")


@pytest.mark.slow  # half a minute of compilation
def test_contact_sheet_is_written(tmp_path):
    assert sheet.main([str(tmp_path / "sheet.png"), "--seed", "3"]) == 0
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
