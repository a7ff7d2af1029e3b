"""The judges, which read a scene off a picture."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from idea_jax.mini import (
    captions,
    drawings,
    networks,
    traits,
)
from idea_jax.mini.pretrain import fit
from idea_jax.mini.pretrain.crops import disturbed
from idea_jax.mini.pretrain.run import JUDGE, Run
from idea_jax.pytrees import stream

OUTPUTS = sum(map(len, captions.KINDS.values()))  # logits of a scene


def split_logits(logits: jax.Array) -> dict:
    """Returns the logits of each field of a scene."""
    edges = np.cumsum([len(kinds) for kinds in captions.KINDS.values()])[:-1]
    return dict(zip(captions.KINDS, jnp.split(logits, edges, axis=-1), strict=True))


def train_judge(run: Run, name: str, images: np.ndarray, scenes: traits.Scene, path: Path) -> dict:
    """Trains a classifier that reads a scene off a picture of one person."""
    kinds = np.stack(scenes, axis=-1)
    net = networks.ConvNet(run.budget.face_widths[:1] + run.budget.face_widths[:3], OUTPUTS)
    start = net.init(stream(run.key, name), jnp.zeros((1, drawings.SIZE, drawings.SIZE, 3)))
    steps, size = run.budget.judge

    def loss(params, batch, key):
        images, kinds = batch
        x = disturbed(drawings.to_float(images), key, drawings.SIZE)
        return scene_error(net.apply({"params": params}, x), kinds)

    def batch(rng):
        rows = rng.integers(0, len(images), size)
        return images[rows], kinds[rows]

    optimizer = fit.muon(start["params"], steps)
    params, losses = fit.fit(run, name, start["params"], loss, batch, steps, optimizer, ema=0.99)
    networks.save(path, params)
    return {"losses": losses}


def scene_error(logits: jax.Array, kinds: jax.Array, shown: jax.Array | bool = True) -> jax.Array:
    """Returns float32[]: cross-entropy of what is read of scenes, the mean over their fields.

    Args:
      logits: float32[..., OUTPUTS], as `split_logits` takes them.
      kinds: int32[..., fields] in the order of `traits.Scene`.
      shown: bool[...], whether there is such a person.
    """
    scene = traits.Scene(*jnp.moveaxis(kinds, -1, 0))
    errors = []
    for field, values in split_logits(logits).items():
        each = optax.softmax_cross_entropy_with_integer_labels(values, getattr(scene, field))
        seen = (scene.hat > 0 if field == "hat_colour" else jnp.ones_like(each)) * shown
        errors.append(jnp.sum(each * seen) / jnp.maximum(jnp.sum(seen), 1))
    return sum(errors) / len(errors)


def train_own_judge(run: Run) -> dict:
    """Trains the judge that the autoencoder is trained with; it stays in the work folder."""
    parts = [run.portraits(split) for split in ("recognition", "scoring")]
    scenes = traits.Scene(*map(np.concatenate, zip(*(part.scenes for part in parts), strict=True)))
    images = np.concatenate([part.images for part in parts])
    return train_judge(run, "judge", images, scenes, run.work / JUDGE)


def train_scoring_judge(run: Run) -> dict:
    """Trains the judge of quality.py, on other drawings, from another start."""
    set_ = run.named()
    alone = set_.names[:, 1, 0] < 0
    scenes = traits.Scene(*(leaf[alone, 0] for leaf in set_.scenes))
    path = run.folder / "judge" / "model.safetensors"
    return train_judge(run, "scoring judge", set_.images[alone], scenes, path)
