"""The training loss: denoising error plus the pull of the pseudo tokens towards the anchor."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.models.precision import exact

ZETA = 2e-5  # ridge on the anchor's covariance, `Whslee/ID-EA` train.py
FLOOR = 1e-8  # of the squared distance, before its root; same source


class AnchorMetric(NamedTuple):
    """The inverse covariance of the anchor rows, in its own directions.

    With n rows of width d the covariance is zeta I plus a matrix of rank n - 1, so its inverse is
    known in closed form: one precision for each direction between the rows, one for all others.

    directions: float32[n, d], orthonormal or zero rows; precisions: float32[n]; ridge: float32[].
    """

    directions: jax.Array
    precisions: jax.Array
    ridge: jax.Array


def anchor_metric(anchor: np.ndarray, *, truncated: bool) -> AnchorMetric:
    """Inverts C = cov(anchor rows) + zeta I, once, in float64.

    Args:
      anchor: float32[n, d].
      truncated: what the published code computes: the pseudo-inverse in float32 with torch's
        default cut-off sets every direction to zero whose eigenvalue is at most
        d * 2**-23 * (largest eigenvalue). For anchors of real size that removes the ridge, so
        only the directions between the anchor rows keep a precision. With one row there are no
        such directions, and nothing costs anything. False: the exact inverse, as the paper
        defines it.

    Source: arXiv 2507.11990 (regulariser); `torch.linalg.pinv` (rtol of a d x d float32 matrix).
    """
    rows = np.asarray(anchor, np.float64)
    n, d = rows.shape
    centred = rows - rows.mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    # n centred rows span at most n - 1 directions; the last singular value is rounding. With one
    # row torch.cov (ddof 1) is undefined; the covariance is taken as the ridge alone, and what
    # truncation leaves of it as nothing, as for all real anchors of two rows.
    variances = singular**2 / max(n - 1, 1)
    is_between = np.arange(len(singular)) < n - 1
    variances = np.where(is_between, variances, 0.0)
    eigenvalues = variances + ZETA
    cutoff = d * 2.0**-23 * max(eigenvalues.max(), ZETA) if truncated else 0.0
    precisions = np.where(is_between & (eigenvalues > cutoff), 1 / eigenvalues, 0.0)
    is_cut = truncated and (n == 1 or cutoff >= ZETA)
    ridge = 0.0 if is_cut else 1 / ZETA
    directions = np.where(is_between[:, None], directions, 0.0)
    return AnchorMetric(np.float32(directions), np.float32(precisions), np.float32(ridge))


def mahalanobis(delta: jax.Array, metric: AnchorMetric) -> jax.Array:
    """Returns sqrt(max(delta C^-1 delta, 1e-8)) of each row: float32[N, d] -> float32[N].

    The part outside the anchor's directions is formed as a vector before it is squared:
    the shorter |delta|^2 - |between|^2 would lose all digits where the ridge (1 / zeta = 50,000)
    multiplies it.
    """
    between = delta @ metric.directions.T
    outside = delta - between @ metric.directions
    squared = (between**2) @ metric.precisions + metric.ridge * jnp.sum(outside**2, axis=-1)
    return jnp.sqrt(jnp.maximum(squared, FLOOR))


def distance(tokens: jax.Array, anchor: jax.Array, metric: dict | None) -> jax.Array:
    """Mean distance float32[] of tokens from an anchor, float32[N, d] both.

    Args:
      metric: the fields of an `AnchorMetric`; None for Euclidean distances.
    """
    delta = tokens - anchor
    if metric is None:
        return jnp.mean(euclidean(delta))
    with exact(jnp.float32):
        return jnp.mean(mahalanobis(delta, AnchorMetric(**metric)))


def euclidean(delta: jax.Array) -> jax.Array:
    """torch's `pairwise_distance` of each row, its eps of 1e-6 included: [N, d] -> [N].

    Source: `lyuPang/CrossInitialization` train code.
    """
    return jnp.sqrt(jnp.sum((delta + 1e-6) ** 2, axis=-1))


def denoising_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error over everything, in float32: the diffusion loss."""
    return jnp.mean((prediction.astype(jnp.float32) - target.astype(jnp.float32)) ** 2)
