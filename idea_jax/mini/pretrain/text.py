"""Captions of the drawings, and the text encoder that is trained on them as CLIP's."""

import functools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from idea_jax.data.tokenizer import Tokenizer, load_tokenizer
from idea_jax.mini import (
    drawings,
)
from idea_jax.mini.pretrain import fit
from idea_jax.mini.pretrain.budget import Budget
from idea_jax.mini.pretrain.crops import unit
from idea_jax.mini.pretrain.judge import OUTPUTS, scene_error
from idea_jax.mini.pretrain.run import CAPTIONS, TEXT_LENGTH, Run
from idea_jax.models import sd, weights
from idea_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from idea_jax.pytrees import stream
from idea_jax.runtime import devices
from idea_jax.runtime.files import atomic_write, write_json

SHARPNESS = 20.0  # of what is read off unit vectors by a matrix of singular values about 1
CAPTIONED = 1500  # drawings whose captions one process makes in one go


def make_drawings(run: Run) -> dict:
    """Makes what several stages learn from: the drawings, and the captions as token ids."""
    for split in ("recognition", "scoring"):
        run.portraits(split)
    text = sd.read_configs(run.folder).text
    tokenizer = load_tokenizer(run.folder / "tokenizer", text.vocab_size, TEXT_LENGTH)
    true, wrong = caption_ids(run, run.named(), tokenizer)
    with atomic_write(run.work / CAPTIONS) as path:
        save_file({"true": true, "wrong": wrong}, path)
    return {}


def caption_ids(
    run: Run, set_: drawings.Drawings, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what is said about each drawing, and what is nearly true of it.

    Returns: int16[N, captions, T] each; where both are equal, there was nothing to replace.
    """
    starts = range(0, len(set_.names), CAPTIONED)
    unseen = set_._replace(images=set_.images[:, :0])  # not sent to other processes
    parts = [
        jax.tree.map(lambda leaf, rows=slice(start, start + CAPTIONED): leaf[rows], unseen)
        for start in starts
    ]
    say = functools.partial(ids_of_captions, tokenizer, run.seed, run.budget.captions)
    workers = min(len(parts), devices.cores())
    with fit.processes(workers) if workers > 1 else nullcontext() as pool:
        made = pool.map(say, parts, starts) if pool else map(say, parts, starts)
        both = list(tqdm(made, "captions", len(parts), disable=run.quiet))
    true, wrong = map(np.concatenate, zip(*both, strict=True))
    return true, wrong


def ids_of_captions(
    tokenizer: Tokenizer, seed: int, count: int, set_: drawings.Drawings, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `caption_ids` of a part of all drawings, the first of which is number `first`."""
    true, wrong = [], []
    for row in range(len(set_.names)):
        texts = [
            drawings.say_both([seed, first + row, number, *b"captions"], set_, row)
            for number in range(count)
        ]
        ids = tokenizer([text for both in texts for text in both]).astype(np.int16)
        true.append(ids[::2])
        wrong.append(ids[1::2])
    return np.stack(true), np.stack(wrong)


def image_configuration(budget: Budget) -> CLIPVisionConfig:
    """The small tower that CLIP's text encoder is trained against."""
    return CLIPVisionConfig(
        hidden_size=128 * budget.text_width // 192,
        intermediate_size=256 * budget.text_width // 192,
        projection_dim=budget.text_width,
        num_hidden_layers=3,
        num_attention_heads=4 if budget.text_width > 32 else 1,
        image_size=drawings.SIZE,
        patch_size=8,
        hidden_act="gelu",
    )


def train_clip(run: Run) -> dict:
    """Trains both towers on drawings and captions; the text encoder is frozen from then on.

    Name and clothes alone find the right caption of a batch, and a text encoder that never needed
    to say who smiles does not; a drawing network that reads it then cannot know. So each picture
    must also tell its caption from one in which a single thing is another (hard negatives, arXiv
    2210.01936), and one linear layer must read the scene off the outputs of both towers, as far as
    it is seen or said (labels in the space of texts and pictures, arXiv 2204.03610).
    """
    model, frozen, tokenizer = run.load()
    set_ = run.named()
    ids = load_file(run.made_before(CAPTIONS))
    config = image_configuration(run.budget)
    tower = CLIPVisionModel(config)
    key = stream(run.key, "clip")
    vision = tower.init(key, jnp.zeros((1, drawings.SIZE, drawings.SIZE, 3)))["params"]
    steps, size = run.budget.clip
    kinds = np.stack(set_.scenes, axis=-1)  # [N, 2, fields]
    shown = set_.names[:, :, 0] >= 0
    anybody = np.flatnonzero(~drawings.listed(set_))

    def read(params, states):
        """float32[B, 2, OUTPUTS] of unit vectors: what is there, left and right."""
        x = SHARPNESS * states @ params["kernel"] + params["bias"][None]
        return x.reshape(-1, 2, OUTPUTS)

    def loss(params, batch, key):
        images, ids, wrong, kinds, shown = batch
        x = drawings.to_float(images)
        x = x * (1 + 0.05 * jax.random.normal(key, (len(x), 1, 1, 1)))
        seen = unit(tower.apply({"params": params["vision"]}, x))
        both = jnp.concatenate([ids, wrong])
        states = model.text_model.apply({"params": params["text"]}, both)
        said = unit(pooled(states, both, tokenizer.eos))
        logits = jnp.exp(jnp.minimum(params["scale"], np.log(100.0))) * seen @ said.T
        is_wrong = jnp.any(ids != wrong, axis=1)
        hidden = jnp.concatenate([jnp.zeros(len(ids)), jnp.where(is_wrong, 0.0, -1e9)])
        own = jnp.arange(len(x))
        each = optax.softmax_cross_entropy_with_integer_labels
        of_texts = each(logits[:, : len(x)].T, own)
        apart = jnp.mean(each(logits + hidden[None], own) + of_texts) / 2
        readings = [
            scene_error(read(params["scene"], states), kinds, shown)
            for states in (seen, said[: len(x)])
        ]
        return apart + sum(readings) / 2

    def batch(rng):
        rows = rng.choice(anybody, size, replace=False)
        which = rng.integers(0, run.budget.captions, size)
        texts = [ids[kind][rows, which].astype(np.int32) for kind in ("true", "wrong")]
        return set_.images[rows], *texts, kinds[rows], shown[rows]

    scene = {"kernel": jnp.zeros((run.budget.text_width, 2 * OUTPUTS))}
    scene["bias"] = jnp.zeros(2 * OUTPUTS)
    params = {"text": frozen.text, "vision": vision, "scale": jnp.log(1 / 0.07), "scene": scene}
    # Adam moves rare rows as fast as common ones: at the full rate, names would lose what they say.
    optimizer = fit.muon(params, steps, slow={"text/embeddings/token_embedding": 0.1})
    params, losses = fit.fit(run, "clip", params, loss, batch, steps, optimizer)
    frozen = frozen._replace(text=params["text"])
    run.save(model, frozen, "text_encoder")
    tensors = weights.to_tensors(weights.vision_table(), {"vision": params["vision"]}, np.float16)
    folder = run.folder / "image_encoder"
    with atomic_write(folder / "model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_json(folder / "config.json", config.to_dict(), indent=1)
    half = [0.5] * 3
    preprocessor: dict = {"image_processor_type": "CLIPImageProcessor", "image_mean": half}
    preprocessor |= {"image_std": half, "size": {"shortest_edge": drawings.SIZE}}
    preprocessor |= {"crop_size": {"height": drawings.SIZE, "width": drawings.SIZE}}
    write_json(folder / "preprocessor_config.json", preprocessor, indent=1)
    return {"losses": losses}


def pooled(states: jax.Array, ids: jax.Array, eos: int) -> jax.Array:
    """Returns float32[B, D]: the text encoder's output at the end of each text."""
    return states[jnp.arange(len(ids)), jnp.argmax(ids == eos, axis=1)]
