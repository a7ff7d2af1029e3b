"""People for tests: learned ones, with random parts far from their start, and drawn portraits."""

import jax
import numpy as np

from idea_jax.formats.identity import Identity
from idea_jax.method import condition, shared
from idea_jax.mini import captions, drawings, traits
from idea_jax.mini import people as drawn_people
from idea_jax.models import sd


def grown(tree, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(x + scale * rng.normal(size=np.shape(x))), tree)


def person(
    model: sd.StableDiffusion,
    profile: str = "paper",
    *,
    kv: str = "low_rank",
    seed: int = 0,
    scale: float = 0.3,
    base_model: str = "tiny",
) -> Identity:
    """Somebody who was learned without a shared ID-Enhancer."""
    method = condition.make_method(profile, kv=kv if profile == "paper" else "none")
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    start = sd.each_encoder(
        model, lambda config: rng.normal(size=(2, config.hidden_size)).astype(np.float32)
    )
    trainable = grown(condition.init_trainable(model, method, key, start), seed, scale)
    face = rng.normal(size=512)
    given = condition.init_given(model, method, key, start, face / np.linalg.norm(face))
    return Identity(method, trainable, given, "<person>", base_model, None, seed, 1)


def enhanced_person(
    model: sd.StableDiffusion,
    config: shared.EnhancerConfig,
    sha256: str,
    *,
    kv: str = "none",
    own_adapter: bool = False,
    seed: int = 0,
) -> Identity:
    """Somebody who began with a shared ID-Enhancer."""
    method = shared.person_method(config, kv=kv, own_adapter=own_adapter)
    start = config.each(lambda width: np.zeros((config.num_tokens, width), np.float32))
    fresh = condition.init_trainable(model, method, jax.random.key(seed), start)
    return Identity(
        method, grown(fresh, seed), {}, "<person>", "tiny", None, seed, 0, enhancer=sha256
    )


def portraits(count: int) -> tuple[np.ndarray, list[str]]:
    """Portraits of named people of the drawn world, uint8[count, 64, 64, 3], and a caption each."""
    numbers = np.arange(count)
    drawn = drawings.portraits(drawn_people.named(numbers, numbers), 1, jax.random.key(0))
    rng = np.random.default_rng(0)
    said = []
    for i in numbers:
        words = captions.scene_words(traits.Scene(*(leaf[i] for leaf in drawn.scenes)))
        said.append(captions.caption(rng, words, drawn_people.full_name(i, i)))
    return drawn.images, said
