"""The identity loss: people are drawn during training, and a recogniser says how like they are.

The error of the noise says little of a likeness: it is that of single steps, most of which know the
face from the noisy picture. So some people of each step are drawn from noise, as a user draws them,
and the gradient of 1 - cosine between the drawing's face and the mean face of the person's other
pictures (of that one, if there is no other) goes back through recogniser, autoencoder and all
sampling steps.

Source: arXiv 2404.16022 (PuLID), section 3.3, which draws with four steps of a distilled model.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from PIL import Image

from idea_jax.config.settings import ConfigError
from idea_jax.data.images import central_square, to_uint8
from idea_jax.enhancer import drawing
from idea_jax.enhancer.samples import FaceBatch, Plan, Reader
from idea_jax.enhancer.settings import EnhancerTrainConfig
from idea_jax.faces import crops, finding, network
from idea_jax.faces import models as face_models
from idea_jax.method import shared
from idea_jax.models import sd
from idea_jax.pytrees import stream
from idea_jax.sampling import programs
from idea_jax.training.results import Base


@dataclass(frozen=True)
class IdentityProgram:
    """All that people are drawn with, besides arrays. Hashable, as the step's program.

    Attributes:
      weight: of the loss.
      size: drawings of a step, over all devices; a multiple of the mesh's.
      drop: how often adapter and K/V are off, as in the other loss.
      empty: token ids of the negative prompt.
    """

    model: sd.StableDiffusion
    config: shared.EnhancerConfig
    recogniser: network.Network
    mesh: Mesh
    sampling: programs.Sampling
    guidance: float
    weight: float
    size: int
    drop: float
    empty: tuple[int, ...]


class Likened(NamedTuple):
    """What a step learns from its drawings: gradients of the weighted loss, shaped after the
    trained parts; float32[], the sum of the similarities and on how many a face was found."""

    grads: dict
    similar: jax.Array
    found: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def draw(
    program: IdentityProgram,
    frozen: sd.Frozen,
    trained: dict,
    constants: dict,
    batch: FaceBatch,
    inputs: dict,
) -> jax.Array:
    """Draws the people of a step, float32[size, side, side, 3] in [-1, 1], split over the mesh.

    Args:
      batch: leaves [size, ...], split over the mesh.
      inputs: "seed", uint32[], of the run; "step", int32[].
    """
    model, config = program.model, program.config

    def of_device(frozen, trained, constants, batch, inputs):
        tree = trained | constants
        key = stream(jax.random.key(inputs["seed"]), "identity loss")
        key = jax.random.fold_in(key, inputs["step"])

        def kept(row):
            whole, number = jax.random.split(jax.random.fold_in(key, row))
            return jax.random.uniform(whole) >= program.drop, jax.random.bits(number, (2,))

        is_whole, numbers = jax.vmap(kept)(batch.row)
        strength = is_whole.astype(jnp.float32)
        kv = shared.keys_values(config, model, tree, frozen, batch.face, batch.token_ids, strength)
        empty = jnp.array(program.empty, jnp.int32)[None]

        def unguided(strength):
            own = shared.unguided_keys_values(config, model, tree, frozen, empty, strength)
            return jax.tree.map(lambda leaf: leaf[0], own)

        plain = jax.vmap(unguided)(strength)
        rows = jax.tree.map(lambda *halves: jnp.stack(halves, axis=1), plain, kv)
        guidance = jnp.full(len(numbers), program.guidance, jnp.float32)
        return programs.draw_rows(model, frozen, rows, numbers, guidance, program.sampling)

    spread = jax.shard_map(
        of_device,
        mesh=program.mesh,
        in_specs=(P(), P(), P(), P("data"), P()),
        out_specs=P("data"),
        check_vma=False,  # as in the step
    )
    return spread(frozen, trained, constants, batch, inputs)


@functools.partial(jax.jit, static_argnums=0)
def likeness_gradient(
    program: IdentityProgram,
    weights: dict,
    pictures: jax.Array,
    matrices: jax.Array,
    found: jax.Array,
    others: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradient of the weighted loss by the pictures, in their shape and place, and float32[2]: the
    sum of the similarities, and how many there are.

    Args:
      weights: of the recogniser.
      matrices: as of `network.cut`; found: float32[size], 1 where there is a face; others:
        float32[size, 512] of unit norm.
    """

    def loss(pictures, weights, matrices, found, others):
        embeds = network.embed(program.recogniser, weights, network.cut(pictures, matrices))
        similar = jnp.sum(embeds * others, axis=-1)
        total = jnp.sum(found * (1 - similar)) * (program.weight / program.size)
        return total, jnp.stack([jnp.sum(found * similar), jnp.sum(found)])

    def of_device(*arguments):
        grads, sums = jax.grad(loss, has_aux=True)(*arguments)
        return grads, jax.lax.psum(sums, "data")

    each = P("data")
    spread = jax.shard_map(
        of_device,
        mesh=program.mesh,
        in_specs=(each, P(), each, each, each),
        out_specs=(each, P()),
        check_vma=False,
    )
    return spread(pictures, weights, matrices, found, others)


class IdentityLoss:
    """Draws people of a step, looks where their faces are, and returns the gradients.

    Args:
      weights: of the program's recogniser, which is that of the prepared data.
      finder: says where on a drawing the face is.
      reader: of a `FacePlan`.
    """

    def __init__(
        self,
        program: IdentityProgram,
        weights: dict[str, np.ndarray],
        finder: finding.Finder,
        reader: Reader,
    ):
        self.program, self.reader = program, reader
        self.weights = drawing.put(weights, program.mesh)
        self.detector = finder.detector

    def __call__(self, frozen: sd.Frozen, trained: dict, constants: dict, inputs: dict) -> Likened:
        """What a step learns from its drawings. All processes of the mesh call it together.

        Args:
          frozen: on the mesh, whole; inputs: as of `draw`.
        """
        program = self.program
        own = drawing.split_rows(next(self.reader), program.mesh)
        given = {name: inputs[name] for name in ("seed", "step")}

        def drawn(trained):
            return draw(program, frozen, trained, constants, own, given)

        pictures, vjp = jax.vjp(drawn, trained)
        there = drawing.split_rows(self.locate(pictures), program.mesh)
        by_picture, sums = likeness_gradient(program, self.weights, pictures, *there, own.others)
        (grads,) = vjp(by_picture)
        return Likened(grads, *sums)

    def close(self) -> None:
        """Ends the reader's threads."""
        self.reader.close()

    def locate(self, pictures: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Where the faces are on this process's pictures, as `likeness_gradient` takes it."""
        shards = sorted(pictures.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        images = to_uint8(np.concatenate([np.asarray(shard.data) for shard in shards]))
        matrices = np.zeros((len(images), 2, 3), np.float32)
        found = np.zeros(len(images), np.float32)
        for row, image in enumerate(images):
            place = place_of(self.detector, Image.fromarray(image))
            if place is not None:  # early in a training a drawing may be no face, and says nothing
                matrices[row], found[row] = place, 1
        return matrices, found


def place_of(detector: face_models.Detector | None, image: Image.Image) -> np.ndarray | None:
    """Where the recogniser's crop lies on an RGB picture, float32[2, 3], as of `network.cut`; None
    if there is no face.

    One look at the picture as it is: drawings are upright, and every step waits for it.

    Args:
      detector: None to take the central square for the face.
    """
    if detector is None:
        left, top, side = central_square(image.size)
        scale = side / face_models.SIZE
        shift = (scale - 1) / 2
        return np.array([[scale, 0, left + shift], [0, scale, top + shift]], np.float32)
    found = finding.detect(detector, image)
    if not found:
        return None
    largest = max(found, key=lambda face: float(np.prod(face.box[2:] - face.box[:2])))
    try:
        there = np.vstack([crops.alignment(largest.points), [0, 0, 1]])
    except face_models.FaceError:  # points that lie as on no face
        return None
    return np.float32(np.linalg.inv(there)[:2])


def of_run(
    cfg: EnhancerTrainConfig,
    base: Base,
    config: shared.EnhancerConfig,
    mesh: Mesh,
    plan: Plan,
    finder: finding.Finder | None,
) -> Callable[[range], IdentityLoss] | None:
    """What makes the loss of some steps of a run; None where nobody is drawn.

    Args:
      plan: of the run, for its people.

    Raises:
      FaceError: gradients cannot pass through the recogniser.
      ConfigError: more sampling steps than the checkpoint has timesteps.
    """
    if not cfg.id_loss_weight or finder is None or finder.recogniser is None:
        return None
    most = base.model.schedule.num_train_timesteps
    if cfg.id_loss_inference_steps > most:
        raise ConfigError(
            f"--id_loss_inference_steps is {cfg.id_loss_inference_steps}; expected at most {most}, "
            "the timesteps that the checkpoint was trained with"
        )
    net, weights = network.read_network(finder.recogniser)
    side = plan.folders[0].index.settings["side"]
    (empty,) = base.tokenizer([""])
    program = IdentityProgram(
        base.model,
        config,
        net,
        mesh,
        programs.Sampling((side, side), "dpmpp_2m", cfg.id_loss_inference_steps),
        cfg.validation_guidance,
        cfg.id_loss_weight,
        cfg.id_loss_drawings,
        cfg.drop_adapter,
        tuple(int(token) for token in empty),
    )
    drawn = plan.of_faces(cfg.id_loss_drawings)

    def make(steps: range) -> IdentityLoss:
        reader = Reader(drawn, steps, jax.process_index(), jax.process_count())
        return IdentityLoss(program, weights, finder, reader)

    return make
