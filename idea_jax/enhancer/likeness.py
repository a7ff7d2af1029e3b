"""How like held-out people are when they are drawn at 0 steps, from one picture of theirs."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from idea_jax.data import images, text
from idea_jax.enhancer import drawing
from idea_jax.enhancer.samples import Folder
from idea_jax.faces import embedding, finding, packs
from idea_jax.faces import models as face_models
from idea_jax.method import shared
from idea_jax.sampling.programs import Sampling
from idea_jax.training.results import Base

STEPS = 25
DRAWN = 4  # pictures that a device draws at once
COLUMNS = 8  # of the grid
LARGEST_SHARE = 4  # one of so many people is held out at most


class HeldOut(NamedTuple):
    """Somebody who is held out: the face of one picture, the mean of the others; float32[512]."""

    face: np.ndarray
    others: np.ndarray


class Likeness(NamedTuple):
    """Of a validation.

    Attributes:
      mean: similarity of the drawings to other pictures of the same person, by the recogniser that
        the training uses; a picture without a face counts as 0.
      worst: the same of the person who is drawn worst.
      found: share of the drawings on which a face is found.
      grid: uint8[H, W, 3], a person's drawings side by side.
    """

    mean: float
    worst: float
    found: float
    grid: np.ndarray


def hold_out(
    folders: Sequence[Folder], count: int, seed: int
) -> tuple[list[np.ndarray], list[HeldOut]]:
    """Returns numbers of the people of each folder to train on, and those who are held out.

    Whoever is held out has two pictures or more. A quarter of all people are held out at most, and
    nobody if that leaves fewer than two.
    """
    able = [
        (place, number)
        for place, folder in enumerate(folders)
        for number, records in enumerate(folder.people)
        if len(records) > 1
    ]
    everybody = sum(len(folder.people) for folder in folders)
    count = min(count, everybody // LARGEST_SHARE, len(able))
    rng = np.random.default_rng([seed, *b"held out"])
    chosen = [able[i] for i in rng.choice(len(able), count, replace=False)] if count else []
    out, sitters = set(chosen), []
    for place, number in chosen:
        folder = folders[place]
        records = folder.people[number]
        others = embedding.mean_embedding(folder.faces.face[records[1:]])
        sitters.append(HeldOut(folder.faces.face[records[0]], others))
    left = [
        np.array([n for n in range(len(folder.people)) if (place, n) not in out], int)
        for place, folder in enumerate(folders)
    ]
    return left, sitters


@dataclass(frozen=True)
class Sitting:
    """How held-out people are drawn: each `count` times, `side` pixels wide and high."""

    prompt: str
    count: int
    guidance: float
    side: int
    seed: int


@functools.partial(jax.jit, static_argnums=(0, 1))
def _keys_values(config, model, tree, frozen, face, token_ids, empty):
    """Leaves [R, 2, T, inner] for R faces and one text."""
    rows = face.shape[0]
    ids = jnp.broadcast_to(token_ids, (rows, *token_ids.shape))
    kv = shared.keys_values(config, model, tree, frozen, face, ids, jnp.ones(rows))
    unguided = shared.unguided_keys_values(config, model, tree, frozen, empty[None])
    return drawing.beside(kv, unguided)


@functools.partial(jax.jit, static_argnums=0)
def _gathered(mesh, frozen):
    return jax.lax.with_sharding_constraint(frozen, NamedSharding(mesh, P()))


def measure(
    config: shared.EnhancerConfig,
    tree: shared.Shared,
    base: Base,
    mesh: Mesh,
    sitters: Sequence[HeldOut],
    finder: finding.Finder | None,
    sitting: Sitting,
) -> Likeness | None:
    """Draws everybody who is held out, as a sitting says. All processes of a mesh call it together.

    Args:
      base: its frozen weights lie on the mesh, whole or split.
      finder: None in processes that have only to help with drawing; they get None.

    Raises:
      TextError: the prompt does not name the person.
    """
    empty, ids = base.tokenizer(["", text.fill(sitting.prompt, base.tokenizer.placeholder)])
    count = sitting.count
    rows = np.repeat(np.stack([sitter.face for sitter in sitters]), count, axis=0)
    numbers = np.array([(sitting.seed, i) for i in range(len(rows))], np.uint32)
    # Whole on every device: without gradients there is room for it.
    is_split = any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(base.frozen))
    frozen = _gathered(mesh, base.frozen) if is_split else base.frozen
    own = jax.tree.map(lambda leaf: leaf.addressable_data(0), frozen)
    near = jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def keys_values(chosen):
        return _keys_values(config, base.model, near, own, rows[chosen], ids, empty)

    batches = drawing.draw_in_batches(
        mesh,
        base.model,
        frozen,
        keys_values,
        numbers,
        DRAWN,
        Sampling((sitting.side,) * 2, "dpmpp_2m", STEPS),
        sitting.guidance,
    )
    drawn = np.concatenate(list(batches))
    if finder is None:
        return None
    similar = np.zeros(len(drawn))
    is_found = np.zeros(len(drawn), bool)
    for row, picture in enumerate(drawn):
        try:
            embed = finder.look_at(Image.fromarray(picture), "a drawing").embed
            similar[row] = embed @ sitters[row // count].others
            is_found[row] = True
        except face_models.FaceError:
            pass
    each = similar.reshape(-1, count).mean(axis=1)
    grid = images.image_grid(list(drawn), count * max(1, COLUMNS // count))
    return Likeness(float(each.mean()), float(each.min()), float(is_found.mean()), grid)


def find_face_model(
    face_model: str | None, face_model_dir: str | None, folder, wanted: str
) -> finding.Finder:
    """The finder whose recogniser has prepared the data.

    Raises:
      FaceError: there is none, or it is another one.
    """
    path = packs.find_recogniser(face_model, face_model_dir, folder / "face", accept_licence=False)
    finder = finding.open_finder(path, needs_detector=False)
    if finder.about.face_model != wanted:
        raise face_models.FaceError(
            f"--data was prepared with the recogniser of SHA-256 {wanted}, and {path.name} has "
            f"{finder.about.face_model}; name the other one with --face_model, or leave out "
            "what looks at faces: --validation_steps 0, no --id_loss_weight"
        )
    return finder


def about(found: Likeness) -> str:
    """A line for the log."""
    return (
        f"likeness at 0 steps {found.mean:.3f} (worst person {found.worst:.3f}; a face is found on "
        f"{found.found:.0%}), by the recogniser that the training itself uses"
    )
