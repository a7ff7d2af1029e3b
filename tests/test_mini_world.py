"""The drawn world: pictures say what was asked for, and different people look different."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idea_jax.mini import face, traits, world

COUNT = 24


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
    for row, fields in enumerate(np.split(np.array(traits.Identity._fields), 2)):
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
    assert world.main([str(tmp_path / "sheet.png"), "--seed", "3"]) == 0
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
