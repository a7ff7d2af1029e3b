"""The two ways in which rows of many people are drawn, for `benchmarks.rows`."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from idea_jax.data.images import to_uint8
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.formats import enhancer as enhancers
from idea_jax.formats.identity import Identity
from idea_jax.method import shared
from idea_jax.method.modules import FACE_WIDTH
from idea_jax.models import hub, sd
from idea_jax.sampling import engine, programs

PROMPTS = ("a photo of {} on the beach", "a sketch of {}", "{} with a red hat", "{} smiling")


def rows_of(artist: engine.Engine, people: int, steps: int) -> list[engine.PictureRow]:
    """Each person with each prompt."""
    size = programs.picture_size(artist.model, None, None)
    sampling = programs.Sampling(size, "ddim", steps)
    return [
        engine.PictureRow((str(number),), prompt, sampling, guidance=5.0)
        for number in range(people)
        for prompt in PROMPTS
    ]


def open_engine(people: int, each: int) -> engine.Engine:
    """The mini, and so many people who can be drawn: "0", "1", ..."""
    found = hub.resolve("mini")
    model, frozen = sd.load(found.folder)
    plain = load_tokenizer(
        found.folder / "tokenizer", model.text.vocab_size, model.text.max_position_embeddings
    )
    enhancer = enhancers.read(found.folder / enhancers.FILE)
    ours = shared.frozen_part(enhancer.shared)
    made = engine.Engine(model, frozen, engine.Texts(plain), each=each, shared=ours)
    rng = np.random.default_rng(0)
    for number in range(people):
        face = rng.normal(size=FACE_WIDTH).astype(np.float32)
        method, trainable = shared.predicted_person(
            enhancer.config, enhancer.shared, face / np.linalg.norm(face)
        )
        identity = Identity(method, trainable, {}, "<person>", "mini", None, 0, 0)
        made.add(str(number), engine.person_of(identity, f"{number}"))
    return made


def a_prompt_a_call(artist: engine.Engine, rows: Sequence[engine.PictureRow]) -> list[np.ndarray]:
    """Pictures of rows as `idea-sample` drew them before rows shared calls: every device has one
    prompt, whose keys and values are computed, fetched and sent before the call."""
    model, texts, size = artist.model, artist.texts, min(len(artist.devices), len(rows))
    mesh = engine.mesh_of(artist.devices[:size])
    frozen = artist.frozen if size > 1 else artist.frozen_alone
    spread, drawn, before = NamedSharding(mesh, P("rows")), [], None
    for first in range(0, len(rows), size):
        chosen = [*rows[first : first + size], *[rows[-1]] * size][:size]
        pairs = []
        for row in chosen:
            prompt, negative = texts.tokens(row)
            (person,) = (texts.people[name] for name in row.cast)
            identity = person.load()
            weights = artist.frozen_alone._replace(shared=artist.shared)
            cast = model, (person.method,), weights, (identity.trainable,)
            strength = np.float32(row.strength)
            named = programs.named_keys_values(*cast, (identity.given,), prompt, strength)
            unguided = programs.unguided_keys_values(*cast, negative, strength)
            pairs.append(jax.device_get((unguided, named)))
        kv = [jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *pair) for pair in pairs]
        kv = jax.tree.map(lambda *leaves: np.concatenate(leaves), *kv)
        numbers = np.array([(row.seed, row.number) for row in chosen], np.uint32)
        guidance = np.array([row.guidance for row in chosen], np.float32)
        put = jax.device_put((kv, numbers, guidance), spread)
        pictures = programs.draw_everywhere(mesh, model, frozen, *put, sampling=rows[0].sampling)
        if before is not None:
            drawn += [to_uint8(picture) for picture in np.asarray(before)]
        before = pictures
    drawn += [to_uint8(picture) for picture in np.asarray(before)]
    return drawn[: len(rows)]


def in_shared_calls(artist: engine.Engine, rows: Sequence[engine.PictureRow]) -> list[np.ndarray]:
    """The same by the engine; nothing of these rows is in its caches."""
    artist.known.remove(lambda key: True)
    return [to_uint8(picture) for _, picture in artist.draw(rows)]
