"""From aligned crops to unit embeddings, their mean, and photos that are unlike the others.

Embeddings are biometric data: nothing here logs or prints them.
"""

from collections.abc import Sequence

import numpy as np

from idea_jax.faces.models import SIZE, WIDTH, FaceError, Recogniser

# A photo is unlike the others if its similarity to their mean lies this many standard deviations
# below the median (robustly estimated), and by at least this much. The first is the usual limit of
# the median rule; the second keeps photos that are all alike from being told apart by noise.
OUTLIER_DEVIATIONS = 3.0
OUTLIER_LEAST = 0.15


def embed_faces(recogniser: Recogniser, crops: Sequence[np.ndarray]) -> np.ndarray:
    """Returns float32[P, 512] of unit norm for P crops uint8[112, 112, 3] in RGB.

    Raises:
      FaceError: there is no crop, one has another shape or dtype, the model cannot process it, or
        its embedding is not finite or zero.
    """
    if len(crops) == 0:
        raise FaceError("expected at least one face crop, got none")
    embeds = []
    for index, crop in enumerate(crops):
        crop = np.asarray(crop)
        if crop.shape != (SIZE, SIZE, 3) or crop.dtype != np.uint8:
            raise FaceError(
                f"expected face crop {index} to be uint8[{SIZE}, {SIZE}, 3], "
                f"got {crop.dtype}{list(crop.shape)}"
            )
        # insightface works on OpenCV's channel order, and swaps it back before the network. One at
        # a time, since some exported models have a fixed batch of one.
        bgr = np.ascontiguousarray(crop[:, :, ::-1])
        try:
            embeds.append(recogniser.model.get_feat(bgr).reshape(-1))
        except Exception as error:  # of OpenCV or onnxruntime, without a common base
            raise FaceError(
                f"the face model {recogniser.path} cannot process a crop "
                f"({type(error).__name__}: {error}); see whether it is an ArcFace model"
            ) from error
    return _normalise(np.stack(embeds), "the embedding of face crop")


def mean_embedding(embeds: np.ndarray) -> np.ndarray:
    """Returns float32[512] of unit norm: the normalised mean of unit embeddings float32[P, 512].

    Raises:
      FaceError: wrong shape, a value that is not finite, or embeddings that cancel out.
    """
    embeds = np.asarray(embeds, np.float32)
    if embeds.ndim != 2 or embeds.shape[0] == 0:
        raise FaceError(f"expected embeddings [P, {WIDTH}] with P >= 1, got {list(embeds.shape)}")
    mean = embeds.astype(np.float64).mean(axis=0, keepdims=True)
    return _normalise(mean, "the mean embedding")[0]


def unlike(embeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of P photos are unlike the others, bool[P], and similarities to the mean [P].

    Of fewer than three photos nobody can tell.

    Args:
      embeds: float32[P, 512] of unit norm.
    """
    similarities = np.asarray(embeds, np.float64) @ mean_embedding(embeds).astype(np.float64)
    median = np.median(similarities)
    # 1.4826 makes the median deviation that of a normal distribution.
    deviation = 1.4826 * np.median(np.abs(similarities - median))
    limit = median - max(OUTLIER_DEVIATIONS * deviation, OUTLIER_LEAST)
    return (similarities < limit) & (len(embeds) >= 3), similarities


def _normalise(embeds: np.ndarray, what: str) -> np.ndarray:
    embeds = embeds.astype(np.float64)
    norms = np.linalg.norm(embeds, axis=1, keepdims=True)
    bad = ~np.isfinite(norms[:, 0]) | (norms[:, 0] < 1e-6)
    if bad.any():
        rows = ", ".join(str(row) for row in np.flatnonzero(bad))
        raise FaceError(
            f"{what} (row {rows}) is zero or not finite; check the picture and the face model"
        )
    return (embeds / norms).astype(np.float32)
