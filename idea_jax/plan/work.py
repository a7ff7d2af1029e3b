"""The programs that are planned, from shapes alone: what each needs of a device, and takes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from idea_jax import costs, random_sd
from idea_jax.config.reading import build
from idea_jax.config.settings import (
    COMPUTE_DTYPES,
    SampleConfig,
    TrainConfig,
    is_guided,
    read_mesh,
)
from idea_jax.enhancer.beginning import config_of
from idea_jax.enhancer.beginning import optimizer_of as enhancer_optimizer_of
from idea_jax.enhancer.samples import EnhancerBatch
from idea_jax.enhancer.settings import EnhancerTrainConfig
from idea_jax.enhancer.step import EnhancerProgram, Recipe
from idea_jax.enhancer.step import init_state as init_enhancer
from idea_jax.enhancer.step import train_step as enhancer_step
from idea_jax.errors import InputError
from idea_jax.faces import models as face_models
from idea_jax.method import shared
from idea_jax.models import hub, sd
from idea_jax.models.bundle import remat_choices
from idea_jax.models.unet import SIZE_IDS
from idea_jax.plan.settings import PlanConfig
from idea_jax.pytrees import abstract
from idea_jax.runtime.chips import Chip, hosts_of
from idea_jax.sampling import engine, programs
from idea_jax.training import sizing
from idea_jax.training.program import (
    Program,
    Shape,
    frozen_shapes,
    frozen_shardings,
    lower_step,
)
from idea_jax.training.start import method_of, optimizer_of, settle

# Published checkpoints whose configs are known here: their family, and what is said of them.
PUBLISHED = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


class PlanError(InputError, ValueError):
    """What was asked for cannot be planned."""


@dataclass(frozen=True)
class Planned:
    """One program on the devices that were named.

    Attributes:
      mesh: sizes of its axes, over all devices.
      per_call: people, samples or pictures of a call, over all devices.
      calls: until all is done.
      memory: bytes on a device, exact, by what they are of.
      temporary: bytes within a call: an estimate; spare: for its error.
      flops, traffic: of a call, on each device; the second an estimate.
      collectives: of a call.
      remat: the backward pass computes the inside of the UNet's blocks again.
      lower: the program for a row of devices that libtpu describes, as many as a process has.
    """

    mesh: dict[str, int]
    per_call: int
    calls: int
    memory: dict[str, int]
    temporary: int
    spare: int
    flops: int
    traffic: int
    collectives: list[costs.Collective]
    shard_frozen: bool
    remat: bool
    lower: Callable[[Any], jax.stages.Lowered] = field(repr=False)

    def total(self) -> int:
        """Bytes on a device."""
        return sum(self.memory.values()) + self.temporary + self.spare


def read_model(cfg: PlanConfig) -> tuple[sd.StableDiffusion, Any]:
    """The model that is planned, and the folder or file of its checkpoint, None for a published
    one. Of a Hub id only the configs are fetched, and a shared ID-Enhancer's file.

    Raises:
      CheckpointNotFound, WeightsError, UnsupportedConfig: there is none.
    """
    dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    if cfg.checkpoint in PUBLISHED:
        family = PUBLISHED[cfg.checkpoint]
        model = random_sd.config(cfg.checkpoint, family, random_sd.CLIP_VOCAB_SIZE)
        return replace(model, compute_dtype=dtype), None
    try:
        folder = hub.resolve(cfg.checkpoint, weights=False).folder
    except hub.CheckpointNotFound as error:
        raise PlanError(
            f"--checkpoint: {error}. Of {', '.join(PUBLISHED)} no file is needed"
        ) from error
    return sd.read_configs(folder, dtype), folder


def kernel_of(cfg: PlanConfig, chip: Chip) -> str:
    """The attention kernel that a run would take there."""
    if cfg.attention == "xla":
        return "xla"
    if chip.platform == "cpu":
        return "chunked"
    if chip.platform == "gpu":
        return "cudnn" if cfg.mixed_precision == "bf16" else "xla"
    return "splash"


def side_of(cfg: PlanConfig, model: sd.StableDiffusion) -> int:
    """Side of the pictures in pixels."""
    return programs.picture_size(model, cfg.resolution, cfg.resolution, ("resolution",) * 2)[0]


def training(cfg: PlanConfig, chip: Chip, devices: int) -> Planned:
    """The steps of people.

    Raises:
      PlanError: the mesh that was asked for cannot be.
    """
    return first_that_fits(cfg, chip, lambda remat: train_with(cfg, chip, devices, remat))


def first_that_fits(cfg: PlanConfig, chip: Chip, plan: Callable[[bool], Planned]) -> Planned:
    """The plan of the first way of `--remat` that fits, of the last one where none does.

    Args:
      plan: of whether the backward pass computes blocks again.
    """
    for remat in remat_choices(cfg.remat):
        found = plan(remat)
        if not chip.room() or found.total() <= chip.room():
            break
    return found


def train_with(cfg: PlanConfig, chip: Chip, devices: int, remat: bool) -> Planned:
    """`training`, with a backward pass that computes blocks again, or does not."""
    model, folder = read_model(cfg)
    model = replace(model, remat=remat)
    flags: dict[str, Any] = {"train_data_dir": ".", "kv": cfg.kv}
    flags["pretrained_model_name_or_path"] = cfg.checkpoint
    flags |= {"mixed_precision": cfg.mixed_precision, "mesh": "auto"}
    if cfg.steps is not None:
        flags["max_train_steps"] = cfg.steps
    if cfg.batch is not None:
        flags["train_batch_size"] = cfg.batch
    if folder is None:
        flags["enhancer"] = "none"
    train = build(TrainConfig, {}, flags)
    enhancer = None
    if folder is not None:
        train, enhancer = settle(train, folder)
    method = method_of(train, enhancer)
    kernel, batch = kernel_of(cfg, chip), train.train_batch_size
    plain = Program(replace(model, attention="xla"), method, optimizer_of(train, method), batch)
    shape = Shape(1, cfg.pictures_per_person, side_of(cfg, model))
    sizes = sizing.Sizes(
        replace(plain, model=replace(model, attention=sizing.traced(kernel))),
        shape,
        enhancer,
        platform=chip.platform,
    )
    hosts = hosts_of(chip, devices)
    how = arrange(cfg, sizes, chip, devices, batch)
    places = how.places()
    mesh = sizing.mesh_of(how.identity, how.data)
    program = replace(plain, mesh=mesh, shard_frozen=how.shard_frozen)
    jaxpr = sizing.trace(program, shape._replace(places=places), enhancer)
    need, held = sizes.need(how), sizes.held(how)

    def lower(chips):
        grid = np.array(chips[: how.identity * how.data]).reshape(how.identity, how.data)
        mesh = jax.sharding.Mesh(grid, mesh_axes(program.mesh), axis_types=(AxisType.Auto,) * 2)
        real = replace(program, model=replace(model, attention=kernel), mesh=mesh, steps_per_call=8)
        return lower_step(real, shape._replace(places=places), 0, enhancer)

    own = -(-cfg.people // hosts)
    return Planned(
        mesh={"identity": how.identity * hosts, "data": how.data},
        per_call=places * hosts,
        calls=-(-own // places) * train.max_train_steps,
        memory={
            "weights that the step reads": need.weights,
            "autoencoder beside them": need.beside,
            "people with optimiser": need.states,
            "photos": need.photos,
        },
        temporary=need.temporary,
        spare=need.spare,
        flops=costs.of_jaxpr(costs.live(jaxpr)),
        traffic=held.traffic,
        collectives=costs.collectives(jaxpr),
        shard_frozen=how.shard_frozen,
        remat=remat,
        lower=lower,
    )


def mesh_axes(mesh) -> tuple[str, ...]:
    """The names of a mesh's axes."""
    return tuple(mesh.axis_names)


def arrange(
    cfg: PlanConfig, sizes: sizing.Sizes, chip: Chip, devices: int, batch: int
) -> sizing.Arrangement:
    """How one process spreads people over its devices: as asked, or as `sizing.choose` says; where
    nothing fits, as few as can be on as many devices as can be.

    Raises:
      PlanError: what was asked for does not fit the devices or the batch.
    """
    hosts = hosts_of(chip, devices)
    local, places = devices // hosts, cfg.identities_per_step
    if places is not None and places % hosts:
        raise PlanError(
            f"--identities_per_step {places} cannot be divided over {hosts} processes; take a "
            f"multiple of {hosts}"
        )
    each = None if places is None else places // hosts
    if cfg.mesh == "auto":
        found = sizing.choose(
            sizes.need,
            devices=local,
            room=chip.room() or None,
            people=-(-cfg.people // hosts),
            batch=batch,
            places=each,
            shard_frozen=cfg.shard_frozen,
        )
        if found is not None:
            return found
        *_, last = sizing.arrangements(local, 1, batch, each, False)
        return last._replace(shard_frozen=cfg.shard_frozen and last.data > 1)
    mesh = read_mesh(cfg.mesh)
    rows, data = mesh["identity"] // hosts, mesh["data"]
    if mesh["identity"] % hosts or rows * data > local or batch % data:
        raise PlanError(
            f"--mesh {cfg.mesh} does not fit {hosts} processes of {local} devices and a batch of "
            f"{batch}: identity is a multiple of the processes, and data divides the batch"
        )
    if (each or rows) % rows:
        raise PlanError(f"--identities_per_step {places} is no multiple of --mesh {cfg.mesh}")
    return sizing.Arrangement(rows, data, (each or rows) // rows, cfg.shard_frozen)


def enhancer_shapes(cfg: PlanConfig, program: EnhancerProgram, side: int) -> tuple:
    """Shapes, types and places of what the step of a shared ID-Enhancer takes.

    Args:
      side: of the pictures, in pixels.
    """
    model, config, mesh, size = program.model, program.config, program.mesh, program.recipe.size
    devices = mesh.size
    frozen = frozen_shapes(model, None)

    def zeros(*shape):
        return config.each(lambda width: np.zeros((*shape, config.num_tokens, width)))

    scale = config.each(lambda _: 1.0)
    tree = jax.eval_shape(
        lambda: shared.init_shared(config, model, jax.random.key(0), zeros(), scale, zeros(1))
    )
    state = jax.eval_shape(lambda tree: init_enhancer(program.optimizer, tree), tree)
    height, T = side // model.vae.downscale, model.text.max_position_embeddings
    latents = (size, height, height, model.vae.latent_channels)
    batch = EnhancerBatch(
        row=jax.ShapeDtypeStruct((size,), np.int32),
        face=jax.ShapeDtypeStruct((size, face_models.WIDTH), np.float32),
        mean=jax.ShapeDtypeStruct(latents, np.float16),
        std=jax.ShapeDtypeStruct(latents, np.float16),
        token_ids=jax.ShapeDtypeStruct((size, T), np.int32),
        size_ids=jax.ShapeDtypeStruct((size, SIZE_IDS), np.int32) if model.text_2 else None,
    )
    whole, each = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    constants = {k: v for k, v in tree.items() if k not in shared.TRAINED}
    inputs = {"seed": (np.uint32, ()), "step": (np.int32, ()), "stop": (np.int32, (devices,))}
    inputs = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=each if shape else whole)
        for name, (dtype, shape) in inputs.items()
    }
    return (
        abstract(frozen, frozen_shardings(frozen, mesh, cfg.shard_frozen)),
        abstract(state, whole),
        abstract(constants, whole),
        abstract(batch, each),
        inputs,
    )


def enhancer(cfg: PlanConfig, chip: Chip, devices: int) -> Planned:
    """The steps of a shared ID-Enhancer, which all devices take together.

    Raises:
      PlanError: the batch cannot be divided over the devices.
    """
    return first_that_fits(cfg, chip, lambda remat: enhance_with(cfg, chip, devices, remat))


def enhance_with(cfg: PlanConfig, chip: Chip, devices: int, remat: bool) -> Planned:
    """`enhancer`, with a backward pass that computes blocks again, or does not."""
    model, _ = read_model(cfg)
    model = replace(model, remat=remat)
    flags: dict[str, Any] = {"pretrained_model_name_or_path": cfg.checkpoint, "data": ["."]}
    flags |= {"max_train_steps": cfg.steps} if cfg.steps is not None else {}
    flags |= {"train_batch_size": cfg.batch} if cfg.batch is not None else {}
    train = build(EnhancerTrainConfig, {}, flags)
    size, kernel = train.train_batch_size, kernel_of(cfg, chip)
    if size % devices:
        raise PlanError(f"--batch {size} cannot be divided over {devices} devices")
    optimizer = enhancer_optimizer_of(train)
    config = config_of(train, model, shared.EnhancerConfig.num_tokens)

    def shapes_on(mesh):
        return enhancer_shapes(cfg, program(mesh, kernel), side_of(cfg, model))

    def program(mesh, attention):
        recipe = Recipe(size, min_snr=train.min_snr_gamma)
        own = replace(model, attention=attention)
        return EnhancerProgram(own, config, recipe, optimizer, mesh, cfg.shard_frozen)

    mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    given = shapes_on(mesh)

    def trace(attention):
        step, asked = enhancer_step.__wrapped__, program(mesh, attention)
        return jax.make_jaxpr(lambda *given: step(asked, *given))(*given).jaxpr

    plain = trace("xla")
    kept = plain if kernel == "xla" else trace(sizing.traced(kernel))
    held = costs.memory(kept, pads_kernels=chip.platform == "tpu")
    frozen, state, constants, batch, _ = given
    read = sizing.device_bytes(frozen._replace(vae={}))
    gathered = sizing.weights_of(frozen, 1)[0] - read  # as of a training's need

    def lower(chips):
        mesh = jax.sharding.Mesh(np.array(chips), ("data",), axis_types=(AxisType.Auto,))
        return enhancer_step.lower(program(mesh, kernel), *shapes_on(mesh))

    return Planned(
        mesh={"data": devices},
        per_call=size,
        calls=train.max_train_steps,
        memory={
            "weights that the step reads": read,
            "autoencoder beside them": sizing.device_bytes(frozen) - read,
            "enhancer with optimiser": sizing.device_bytes((state, constants)),
            "samples": sizing.device_bytes(batch),
        },
        temporary=held.peak + gathered,
        spare=sizing.spare_of(held.peak, chip.platform),
        flops=costs.of_jaxpr(costs.live(plain)),
        traffic=held.traffic,
        collectives=costs.collectives(plain),
        shard_frozen=cfg.shard_frozen,
        remat=remat,
        lower=lower,
    )


def drawing(cfg: PlanConfig, chip: Chip, devices: int) -> Planned:
    """Pictures of one prompt a device, drawn with the defaults of `idea-sample`."""
    model, _ = read_model(cfg)
    flags: dict[str, Any] = {"prompt": ["{}"], "identity": ["."]}
    flags["pretrained_model_name_or_path"] = cfg.checkpoint
    flags |= {"num_inference_steps": cfg.steps} if cfg.steps is not None else {}
    flags |= {"batch_size": cfg.batch} if cfg.batch is not None else {}
    sample = build(SampleConfig, {}, flags)
    kernel = kernel_of(cfg, chip)
    batch = min(sample.batch_size, math.ceil(cfg.people / devices))
    used = min(devices, math.ceil(cfg.people / batch))
    side = side_of(cfg, model)
    how = programs.choose_sampling(
        model,
        sample,
        (side, side),
        scheduler=None,
        steps=sample.num_inference_steps,
        guidance=sample.guidance_scale,
    )
    mesh = AbstractMesh((used,), ("rows",), axis_types=(AxisType.Auto,))
    kind = engine.Kind(how, 1, is_guided(sample.guidance_scale))

    def trace(attention):
        draw, own = programs.draw_everywhere.__wrapped__, replace(model, attention=attention)
        given = engine.call_shapes(own, kind, used * batch, mesh)
        return jax.make_jaxpr(lambda *given: draw(mesh, own, *given, how))(*given).jaxpr

    def lower(chips):
        mesh = engine.mesh_of(chips[:used])
        own = replace(model, attention=kernel)
        given = engine.call_shapes(own, kind, used * batch, mesh)
        return programs.draw_everywhere.lower(mesh, own, *given, how)

    plain = trace("xla")
    kept = plain if kernel == "xla" else trace(sizing.traced(kernel))
    held = costs.memory(kept, pads_kernels=chip.platform == "tpu")
    frozen, kv, *_ = engine.call_shapes(model, kind, used * batch, mesh)
    return Planned(
        mesh={"rows": used},
        per_call=used * batch,
        calls=math.ceil(cfg.people / (used * batch)),
        memory={
            "weights": sizing.device_bytes(frozen),
            "keys and values of prompts": sizing.device_bytes(kv),
        },
        temporary=held.peak,
        spare=sizing.spare_of(held.peak, chip.platform),
        flops=costs.of_jaxpr(costs.live(plain)),
        traffic=held.traffic,
        collectives=costs.collectives(plain),
        shard_frozen=False,
        remat=False,
        lower=lower,
    )


JOBS = {"train": training, "enhancer": enhancer, "sample": drawing}
