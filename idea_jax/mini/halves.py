"""K/V deltas on one half of guidance or both, with the ID-Adapter and without: people measured.

K/V deltas act on both halves of guidance, as a LoRA does; they could act on the prompt's half
alone, and no LoRA can say the ID-Adapter. Every person is learned once, and drawn in each of the
forms from the same noise. Similarities and what prompts asked for are those of
`idea_jax.mini.trials`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.config.settings import TrainConfig
from idea_jax.data import text
from idea_jax.data.images import to_uint8
from idea_jax.method import condition
from idea_jax.mini import captions, measures, trials
from idea_jax.models import sd
from idea_jax.models.unet import project_kv
from idea_jax.sampling import programs


class Form(NamedTuple):
    """How a person is drawn.

    Attributes:
      kv: halves of guidance that K/V deltas act on: "prompt", "both" or "none".
      adapter: whether the ID-Adapter acts on the prompt.
    """

    kv: str
    adapter: bool


FORMS = {
    "prompt half": Form("prompt", True),
    "both halves": Form("both", True),  # this project, diffusers with `load_identity`, ComfyUI
    "prompt half, no adapter": Form("prompt", False),
    "both halves, no adapter": Form("both", False),  # a plain LoRA and tokens: AUTOMATIC1111
    "tokens alone": Form("none", False),
}


def keys_values(
    form: Form,
    model: sd.StableDiffusion,
    method: condition.Method,
    frozen: sd.Frozen,
    trainable: condition.Trainable,
    given: condition.Given,
    ids: jax.Array,
) -> dict:
    """What `programs.prompt_keys_values` returns, in a form.

    Args:
      ids: int32[2, T], of the prompt and of the negative prompt.
    """
    drawn = replace(method, adapter=form.adapter and method.adapter)
    strength = jnp.float32(form.kv != "none")
    kv = programs.prompt_keys_values(
        model, drawn, frozen, trainable, given, ids[0], ids[1], strength
    )
    if form.kv != "prompt":
        return kv
    plain = project_kv(frozen.cross_kv, sd.encode_text(model, frozen, ids[1][None]), model.dtype)
    return jax.tree.map(lambda both, one: jnp.concatenate([one, both[1:]]), kv, plain)


# Of several prompts, leaf by leaf as of one.
_keys_values = jax.jit(jax.vmap(keys_values, in_axes=(None,) * 6 + (0,)), static_argnums=(0, 1, 2))


def experiment(
    mini: measures.Mini,
    configs: dict[int, TrainConfig],
    protocol: trials.Protocol,
    progress: Callable = iter,
) -> dict[str, list[trials.Score]]:
    """Returns the scores of every person, by number of steps and form, and those of the lab's floor
    and ceiling.

    Args:
      configs: by their number of steps.

    Raises:
      FaceError: on some photos no face is found.
    """
    split, count, photos, pictures, _, seed = protocol
    met = trials.meet(mini, split, range(count), pictures, seed, photos=photos)
    trials.check_faces(mini, met)
    scoring = mini.scoring()
    scores: dict[str, list[trials.Score]] = {}
    for i, person in enumerate(met):
        for name, other in (("another person", met[i - 1]), ("true drawings", person)):
            result = trials.judge_pictures(mini, scoring, person, other.true)
            scores.setdefault(name, []).append(trials.Score(*result))
    texts = [prompt.text for prompt in captions.PROMPTS]
    for number, cfg in configs.items():
        learner = trials.Lab(mini, cfg)
        tokenizer = learner.base.tokenizer
        empty, *filled = tokenizer(
            ["", *(text.fill(prompt, tokenizer.placeholder) for prompt in texts)]
        )
        ids = jnp.asarray(np.stack([np.stack([own, empty]) for own in filled]))
        for person in progress(met):
            state, losses = learner.learn(person.photos)
            for name, form in FORMS.items():
                kv = _keys_values(
                    form,
                    mini.model,
                    learner.method,
                    learner.frozen,
                    state.trainable,
                    state.given,
                    ids,
                )
                drawn = trials.draw_together(
                    mini.model, mini.frozen, kv, jnp.uint32(seed), pictures
                )
                result = trials.judge_pictures(mini, scoring, person, to_uint8(np.asarray(drawn)))
                row = f"{number} steps, {name}"
                scores.setdefault(row, []).append(trials.Score(*result, steps=len(losses)))
    return scores
