"""From faces to names without a gradient: a ridge regression of token embeddings on faces.

The text encoder knows names, and how their people look is known from the pictures that the model
draws by them. So a linear map from one to the other already says something of every face.

Source: MagicNaming regresses name embeddings from pictures in the same way.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.enhancer.samples import Folder
from idea_jax.enhancer.shards import ShardsError
from idea_jax.method import shared
from idea_jax.models import sd

STRENGTHS = tuple(float(s) for s in np.logspace(-3, 2, 21))
FOLDS = 5
LEAST_NAMES = 2 * FOLDS


class Ridge(NamedTuple):
    """A centred linear map: tokens = target_mean + (face - face_mean) @ kernel.

    Attributes:
      kernel: float64[512, N * D].
      face_mean: float64[512]; target_mean: float64[N * D].
      strength: lambda, chosen by cross-validation.
      r2: share of the variance that it explains of names that it was not fitted on; below zero it
        is worse than their mean.
      names: that it was fitted on.
    """

    kernel: np.ndarray
    face_mean: np.ndarray
    target_mean: np.ndarray
    strength: float
    r2: float
    names: int


def fit(faces: np.ndarray, targets: np.ndarray, seed: int = 0) -> Ridge:
    """Fits a ridge regression; lambda is that with the best prediction over `FOLDS` folds.

    Args:
      faces: float[K, 512]; targets: float[K, N * D]; K is at least `LEAST_NAMES`.

    Raises:
      ShardsError: there are too few.
    """
    if len(faces) < LEAST_NAMES:
        raise ShardsError(
            f"the regression needs {LEAST_NAMES} celebrities or more, got {len(faces)}; prepare "
            "more names (--people celebrities), or take another --start"
        )
    faces, targets = np.asarray(faces, np.float64), np.asarray(targets, np.float64)
    fold = np.random.default_rng([seed, *b"ridge"]).permutation(len(faces)) % FOLDS
    missed, spread = np.zeros(len(STRENGTHS)), 0.0
    for part in range(FOLDS):
        is_in = fold != part
        solve, face_mean, target_mean = solver(faces[is_in], targets[is_in])
        own = targets[~is_in] - target_mean
        spread += (own**2).sum()
        for place, strength in enumerate(STRENGTHS):
            predicted = (faces[~is_in] - face_mean) @ solve(strength)
            missed[place] += ((own - predicted) ** 2).sum()
    best = int(missed.argmin())
    solve, face_mean, target_mean = solver(faces, targets)
    r2 = 1 - missed[best] / max(spread, 1e-300)
    kernel = solve(STRENGTHS[best])
    return Ridge(kernel, face_mean, target_mean, STRENGTHS[best], float(r2), len(faces))


def solver(faces: np.ndarray, targets: np.ndarray):
    """Returns (lambda -> kernel), mean face, mean target; one decomposition for all lambdas."""
    face_mean, target_mean = faces.mean(axis=0), targets.mean(axis=0)
    left, singular, right = np.linalg.svd(faces - face_mean, full_matrices=False)
    projected = left.T @ (targets - target_mean)

    def solve(strength):
        return right.T @ ((singular / (singular**2 + strength))[:, None] * projected)

    return solve, face_mean, target_mean


def examples(
    folders: Sequence[Folder],
    people: Sequence[np.ndarray],
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
) -> tuple[np.ndarray, Any]:
    """Mean faces float[K, 512] of everybody with a name, and its token embeddings float[K, N, D];
    of two text encoders a dict of those of each.

    Args:
      people: numbers of the people of each folder who may be used.

    Raises:
      ShardsError: nobody has a name.
    """
    faces, ids = [], []
    for folder, numbers in zip(folders, people, strict=True):
        for number in numbers:
            records = folder.people[number]
            name = folder.faces.name_ids[records[0]]
            if (name >= 0).all():
                total = folder.faces.face[records].astype(np.float64).sum(axis=0)
                faces.append(total / max(np.linalg.norm(total), 1e-6))
                ids.append(name)
    if not faces:
        raise ShardsError(
            "nobody in --data has a name that the text encoder knows in as many tokens as there "
            "are pseudo tokens, and --start ridge learns from such people; prepare some with "
            "--people celebrities, or take --start names"
        )
    if np.max(ids) >= model.text.vocab_size:
        raise ShardsError("a name in --data has tokens that the text encoder does not have")
    embeds = jax.device_get(sd.embed_tokens(model, frozen, np.stack(ids)))
    return np.stack(faces), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), embeds)


def fit_each(
    config: shared.EnhancerConfig, faces: np.ndarray, targets: Any, seed: int
) -> dict[str, Ridge]:
    """A regression for each text encoder, by its name; that of the only one has none.

    Args:
      targets: of `examples`.

    Raises:
      ShardsError: as `fit`.
    """
    fitted = config.each(lambda _, own: fit(faces, own.reshape(len(own), -1), seed), targets)
    return fitted if config.dim_2 else {"": fitted}


def about(fitted: dict[str, Ridge]) -> dict:
    """What a file says of regressions; of two, each value is a dict."""
    first = next(iter(fitted.values()))
    strengths = {of: ridge.strength for of, ridge in fitted.items()}
    r2 = {of: round(ridge.r2, 4) for of, ridge in fitted.items()}
    alone = len(fitted) == 1
    return {
        "names": first.names,
        "strength": strengths[""] if alone else strengths,
        "r2": r2[""] if alone else r2,
    }


def into(
    config: shared.EnhancerConfig, tree: shared.Shared, fitted: dict[str, Ridge]
) -> shared.Shared:
    """A shared tree whose affine map is the regression, exactly; it has one, and it is zero."""

    def of_each(D, enhancer, start, scale, ridge):
        width, N = len(ridge.face_mean), config.num_tokens
        start, scale = np.asarray(start, np.float64), float(scale)
        kernel = ridge.kernel.reshape(width, N, D).transpose(1, 0, 2)
        bias = (ridge.target_mean - ridge.face_mean @ ridge.kernel).reshape(N, D) - start
        return {
            **enhancer,
            # The network sees faces of unit size in each value, and counts in units of scale.
            "skip_kernel": jnp.asarray(kernel / (scale * math.sqrt(width)), jnp.float32),
            "skip_bias": jnp.asarray(bias / scale, jnp.float32),
        }

    parts = (tree[name] for name in ("enhancer", "start", "scale"))
    ridges = fitted if config.dim_2 else fitted[""]
    return {**tree, "enhancer": config.each(of_each, *parts, ridges)}
