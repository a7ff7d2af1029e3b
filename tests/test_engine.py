"""The engine: a row's picture depends on the row alone, and nothing compiles after warm-up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idea_jax.config.settings import ConfigError
from idea_jax.data import text
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.formats.identity import Identity
from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.sampling import engine, programs
from idea_jax.sampling.engine import Engine, PictureRow, Texts, person_of

SAMPLING = programs.Sampling((8, 8), "ddim", 3)


@pytest.fixture(scope="module")
def loaded(smallest_checkpoint):
    model, frozen = sd.load(smallest_checkpoint)
    return (
        model,
        frozen,
        load_tokenizer(smallest_checkpoint / "tokenizer", model.text.vocab_size, 77),
    )


def identity(model, number):
    """Somebody whose parts are all far from their start."""
    method = condition.make_method("paper", kv="low_rank")
    rng = np.random.default_rng(number)
    start = rng.normal(size=(2, 8)).astype(np.float32)
    key = jax.random.key(number)
    trainable = condition.init_trainable(model, method, key, start)
    trainable = jax.tree.map(lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)), trainable)
    face = rng.normal(size=512)
    given = condition.init_given(model, method, key, start, face / np.linalg.norm(face))
    return Identity(method, trainable, given, f"<person-{number}>", "tiny", None, 0, 1)


def make(loaded, each, people=3, devices=2):
    model, frozen, plain = loaded
    made = Engine(model, frozen, Texts(plain), each=each, devices=jax.devices()[:devices])
    for number in range(people):
        made.add(f"p{number}", person_of(identity(model, number), f"digest {number}"))
    return made


def rows():
    """Rows of four kinds, which differ in everything that a row may say."""
    plain = PictureRow(("p0",), "a photo of {}", SAMPLING, guidance=3.0)
    return [
        plain,
        dataclasses.replace(plain, cast=("p1",), guidance=7.5),
        dataclasses.replace(plain, prompt="a sketch of {}", negative="blurry", strength=0.5),
        dataclasses.replace(plain, cast=("p2",), seed=2**32 - 1, number=11),
        dataclasses.replace(plain, prompt="a photo of {} " + "dog " * 80),
        dataclasses.replace(plain, guidance=1.0),
        dataclasses.replace(plain, cast=("p0", "p2"), prompt="{p2} beside {p0}"),
        dataclasses.replace(plain, sampling=programs.Sampling((12, 8), "dpmpp_2m", 2)),
        dataclasses.replace(plain, number=1),
    ]


def drawn(made, chosen):
    """Pictures in the order of their rows."""
    found = dict(made.draw(chosen))
    assert sorted(found) == list(range(len(chosen)))
    return [found[place] for place in range(len(chosen))]


def test_a_picture_has_the_same_bits_alone_in_any_company_and_after_a_restart(loaded, rounding):
    made, asked = make(loaded, 2), rows()
    together = drawn(made, asked)
    assert len({picture.tobytes() for picture in together}) == len(asked)
    backwards = drawn(made, asked[::-1])[::-1]
    restarted = make(loaded, 2)
    alone = [drawn(restarted, [row])[0] for row in asked]
    for first, *others in zip(together, backwards, alone, strict=True):
        for other in others:
            np.testing.assert_allclose(first, other, rtol=0, atol=rounding)


def test_a_row_is_drawn_with_its_own_prompt_person_and_guidance(loaded):
    """Against the program of one prompt, with keys and values computed by themselves."""
    model, frozen, plain = loaded
    asked = rows()[:4]
    for row, picture in zip(asked, drawn(make(loaded, 2), asked), strict=True):
        who = identity(model, int(row.cast[0][1:]))
        tokenizer = plain.with_placeholder(who.placeholder, 2)
        words = [text.fill(row.prompt, tokenizer.placeholder), row.negative]
        kv = programs.prompt_keys_values(
            model,
            who.method,
            frozen,
            who.trainable,
            who.given,
            *tokenizer(words),
            jnp.float32(row.strength),
        )
        number = jnp.array([row.number], jnp.int32)
        guidance = jnp.float32(row.guidance)
        expected = programs.draw(
            model, frozen, kv, jnp.uint32(row.seed), number, guidance, SAMPLING
        )
        np.testing.assert_allclose(picture, expected[0], atol=1e-4)


def test_nothing_is_compiled_after_warm_up(loaded):
    """Neither for other people and texts, nor for numbers of rows, nor for any value of a row."""
    made = make(loaded, 2)
    plain, other = PictureRow(("p0",), "a photo of {}", SAMPLING), rows()[7]
    made.warm_up([plain, other])
    compiled = []
    event = "/jax/core/compile/backend_compile_duration"
    listen = lambda name, _, **about: compiled.append(about) if name == event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        made.add("p9", person_of(identity(made.model, 9), "digest 9"))
        asked = [
            dataclasses.replace(
                plain, cast=(f"p{number % 3}",), number=number, guidance=2.0 + number
            )
            for number in range(7)
        ]
        asked += [dataclasses.replace(plain, cast=("p9",), prompt="{} again", negative="blurry")]
        asked += [dataclasses.replace(other, cast=("p1",), strength=0.25)]
        for count in (1, 2, 3, len(asked)):
            drawn(made, asked[-count:])
        assert compiled == []
        drawn(made, [dataclasses.replace(plain, sampling=programs.Sampling((8, 8), "ddim", 2))])
        assert compiled  # another kind is seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_calls_are_under_way_while_pictures_are_taken_and_filled_up_calls_cost_none(
    loaded, monkeypatch
):
    """Five rows of one kind, two of another, in calls of two rows on one device."""
    happened = []

    class Pictures:
        def __init__(self, numbers):
            self.numbers = numbers

        def __array__(self, dtype=None, copy=None):
            happened.append("fetched")
            return np.asarray(self.numbers)[:, 1, None]

    def pretend(mesh, model, frozen, kv, numbers, guidance, sampling):
        happened.append(f"call of {len(numbers)}")
        return Pictures(numbers)

    monkeypatch.setattr(programs, "draw_everywhere", pretend)
    made = make(loaded, 2, devices=1)
    plain = PictureRow(("p0",), "{}", SAMPLING)
    asked = [dataclasses.replace(plain, number=10 + place) for place in range(7)]
    asked[2:4] = [dataclasses.replace(row, guidance=1.0) for row in asked[2:4]]
    found = [(place, int(picture[0])) for place, picture in made.draw(asked)]
    assert found == [(place, 10 + place) for place in (0, 1, 4, 5, 6, 2, 3)]
    call, fetched = "call of 2", "fetched"
    assert happened == [call, call, fetched, call, fetched, call, fetched, fetched]
    # Keys and values were computed once: of the prompt, and of the negative one.
    assert len(made.known.entries) == 2


def test_whoever_is_removed_is_in_no_cache(loaded):
    made = make(loaded, 1, devices=1)
    asked = [row for row in rows() if "p0" in row.cast]
    drawn(made, asked[:2])
    assert made.remove("p0") > 0
    assert made.remove("p0") == 0
    caches = made.known.entries, made.near.entries, made.texts.kept.entries
    assert not [key for cache in caches for key in cache if "p0" in str(key) or " 0" in str(key)]
    with pytest.raises(KeyError):
        made.launch(asked[:1])
    # The same file by another name keeps what is known of it.
    who = person_of(identity(made.model, 0), "digest 0")
    made.add("a", who)
    made.add("b", who)
    drawn(made, [dataclasses.replace(asked[0], cast=("a",))])
    assert made.remove("a") == 1  # its tokens
    assert made.near.entries


def test_what_is_kept_is_bounded(monkeypatch):
    kept = engine.Kept(100, by_bytes=True)
    for number in range(20):
        assert kept.get(number, lambda: np.zeros(40, np.uint8)).nbytes == 40
    assert list(kept.entries) == [18, 19] and kept.size == 80
    kept.get("large", lambda: np.zeros(1000, np.uint8))
    assert list(kept.entries) == ["large"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": "a photo"}, text.TextError, "does not mention the person"),
        ({"prompt": "{p1}"}, text.TextError, "'{p1}'"),
        ({"negative": "<person-0> at sea"}, ConfigError, "leave <person-0> out"),
        ({"prompt": "{} " + "dog " * 2000}, text.TextError, "tokens, at most"),
        ({"cast": ("nobody",)}, KeyError, "nobody"),
    ],
)
def test_rows_that_cannot_be_drawn_are_refused_before_a_call(loaded, change, error, message):
    made = make(loaded, 1, devices=1)
    with pytest.raises(error, match=message):
        made.texts.kind(dataclasses.replace(rows()[0], **change))


def test_sizes_of_calls():
    class Device:
        platform = "gpu"

    cpus = jax.devices()
    assert engine.sizes_on(cpus[:1], 1) == (1,)
    assert engine.sizes_on(cpus[:4], 8) == (8, 32)  # one shape for a device
    assert engine.sizes_on([Device()], 8) == (1, 2, 4, 8)
    assert engine.sizes_on([Device()] * 2, 6) == (1, 2, 4, 6, 12)
    assert [engine.size_for(n, (1, 2, 4, 8)) for n in (1, 3, 8, 9)] == [1, 4, 8, 8]
    assert [engine.rows_of_each(n, 2, 8) for n in (1, 3, 16, 99)] == [1, 2, 8, 8]
