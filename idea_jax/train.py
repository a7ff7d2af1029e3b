"""Learning people: photos in, identity files out."""

import functools
import gc
import hashlib
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from idea_jax import (
    checkpoint,
    compile_cache,
    devices,
    face_models,
    face_table,
    faces,
    jobs,
    learned_embeds,
    portraits,
    publish,
    sample,
)
from idea_jax.config import COMPUTE_DTYPES, ConfigError, TrainConfig
from idea_jax.config import resolve as resolve_config
from idea_jax.data import images, people, text
from idea_jax.files import WriteError, check_writable, file_digest, write_together
from idea_jax.formats import enhancer as enhancers
from idea_jax.group import Learner, has_plateau, train_together
from idea_jax.method import anchor, condition, shared
from idea_jax.models import flash, hub, sd
from idea_jax.portraits import Portraits
from idea_jax.pytrees import abstract, count
from idea_jax.results import (
    Base,
    Occupant,
    OccupiedError,
    Results,
    TrainingError,
    occupant_of,
    refuse_another,
    remove_finished,
    remove_unfinished,
    trigger_of,
)
from idea_jax.signals import Interrupted
from idea_jax.train_step import (
    IdentityState,
    Photos,
    Plateau,
    evaluate_people,
    init_state,
    make_optimizer,
    rate_over_steps,
    shard_specs,
    step_people,
)

log = logging.getLogger(__name__)

# Settings that may differ between a run and its resumption: they do not touch the numbers.
FREE_ON_RESUME = frozenset(
    {
        *("pretrained_model_name_or_path", "variant", "train_data_dir", "output_dir", "overwrite"),
        *("dataset", "dataset_dir", "identities"),
        *("preset", "celeb_path", "max_train_steps", "save_steps", "only_save_embeds"),
        # How faces were found is compared by what did it: see fingerprint_of.
        *("face_model", "face_model_dir", "accept_face_licence", "face_embeddings"),
        # A GPU moves embeddings by rounding alone, and precomputed faces do not say where they ran.
        "face_provider",
        *("validation_prompt", "validation_prompt_file"),
        *("validation_steps", "num_validation_images"),
        *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
        *("report_to", "logging_dir", "compile_cache", "attention"),
        # Who is trained beside whom, and where, moves results by rounding alone.
        *("identities_per_step", "mesh", "shard_frozen", "distributed", "steps_per_call"),
        # Of the shared ID-Enhancer its file's digest counts; `unsaid` is no setting.
        *("enhancer", "unsaid"),
        *("push_to_hub", "hub_model_id", "hub_token", "publish_consent"),
    }
)
# Settings that came later, with what they were for all who did not know them. A fingerprint has
# None for that, as one from before has for what it does not name: what was begun then can go on.
SINCE = {
    "train_parts": None,
    "self_contained": False,
    "enhanced_learning_rate": None,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "gradient_accumulation_steps": 1,
}
LATER = (*SINCE, "regulariser", "enhancer_sha256")
# What of a fingerprint decides the person that a shared ID-Enhancer predicts.
OF_PREDICTION = (
    *("base_model", "revision", "enhancer_sha256", "placeholder_token", "self_contained", "seed"),
    *("pictures_per_person", "drop_outliers", "face_model", "detector", "face_select"),
    "pre_aligned",
)

# What can be wrong with one person of many, and does not concern the others.
PERSON_ERRORS = (
    images.ImageError,
    people.PeopleError,
    face_models.FaceError,
    checkpoint.CheckpointError,
    TrainingError,
    OccupiedError,
    OSError,
)


@dataclass(frozen=True)
class Work:
    """What the training of every person of a run has in common.

    Without a step to take there is no `optimizer`, `start` or frozen model in `base`.
    """

    cfg: TrainConfig
    method: condition.Method
    base: Base
    optimizer: optax.GradientTransformation | None
    enhancer: enhancers.Enhancer | None  # the shared one, if people begin with it
    start: jax.Array | None  # float32[N, D], the pseudo tokens' first value without it
    side: int  # of the training images, in pixels
    eyes: faces.Finder | face_table.Table | None
    validation: list[str]
    layout: devices.Layout
    pictures: int  # that the compiled step has places for
    room: int  # steps that one call takes at most
    about: dict  # the fingerprint of a person, but for their photos
    is_word: Callable[[str], bool]  # whether the vocabulary has a text as one word

    def step(self, states: IdentityState, photos: Photos, last: jax.Array, count: jax.Array):
        """`step_people` with all bound that is the same for every group."""
        return step_people(
            self.base.model,
            self.method,
            self.optimizer,
            self.cfg.train_batch_size,
            self.layout.mesh,
            self.cfg.shard_frozen,
            self.room,
            self.base.frozen,
            states,
            photos,
            jax.random.key(self.cfg.seed),
            last,
            count,
        )

    def evaluate(self, states: IdentityState, photos: Photos, due: jax.Array) -> IdentityState:
        """`evaluate_people` with all bound that is the same for every group."""
        return evaluate_people(
            self.base.model,
            self.method,
            self.layout.mesh,
            self.cfg.shard_frozen,
            self.base.frozen,
            states,
            photos,
            jax.random.key(self.cfg.seed),
            due,
        )


def run(cfg: TrainConfig) -> list[Path]:
    """Trains one person, or several, some of them together; returns the paths of identity files.

    The files of one person are in `output_dir`, those of several in a folder each in it, and there
    `jobs.jsonl` says what became of whom: see `train_many`.

    Raises:
      ConfigError, ImageError, PeopleError, FaceError, TextError, CheckpointNotFound, WeightsError,
      UnsupportedConfig, EnhancerError, CheckpointError, DevicesError, JobsError: bad input, found
      before training starts; of several people, what concerns one of them alone is a
      `TrainingError` at the end.
      TrainingError: the loss became non-finite; the last good identity is on disk.
      Interrupted: SIGINT or SIGTERM; a checkpoint is on disk.
    """
    with devices.joined() if cfg.distributed else nullcontext():
        return train_people(cfg)


def train_people(cfg: TrainConfig) -> list[Path]:
    """`run`, once the processes are joined.

    Raises:
      as `run`.
    """
    started = time.monotonic()
    # What can be wrong and is cheap to see comes first.
    people.places(cfg.identities)
    if cfg.validation_prompt_file is not None:
        prompts = text.read_prompts(Path(cfg.validation_prompt_file))
        cfg = replace(cfg, validation_prompt=prompts, validation_prompt_file=None)
    face_models.check_select(cfg.face_select)
    everybody = people_of(cfg)
    devices.check_same_people(list(everybody))
    is_single = list(everybody) == [""]
    alone = person_of(cfg, "", everybody[""]) if is_single else None
    own = devices.own_share(list(everybody))
    if not is_single and cfg.push_to_hub:
        raise ConfigError(
            "--push_to_hub is for one person; of several, each has to be asked: upload their "
            "folders one by one with hf upload"
        )
    if is_single and cfg.distributed:
        raise ConfigError("--distributed is for several people: each process trains its own")
    if cfg.overwrite and not is_single:
        raise ConfigError(
            "--overwrite is for one person; of several, delete the folder of whom you want to "
            f"replace in {cfg.output_dir}"
        )
    layout = devices.layout(
        cfg.mesh_shape(), cfg.identities_per_step, max(len(own), 1), cfg.train_batch_size
    )
    if is_single and layout.places > 1:
        raise ConfigError(
            f"{cfg.train_data_dir} holds the photos of one person; --identities_per_step and "
            "--mesh identity=N are for several"
        )
    with jobs.only_run(Path(cfg.output_dir), jax.process_index()):
        return run_locked(cfg, everybody, own, alone, layout, started)


def run_locked(
    cfg: TrainConfig,
    everybody: dict[str, list],
    own: Sequence[str],
    alone: people.Person | None,
    layout: devices.Layout,
    started: float,
) -> list[Path]:
    """`run` once it is known who is trained, and that no other run uses the folder.

    Args:
      own: those of everybody whom this process trains.
      alone: the only person of the run; None if there may be several.
      started: when the run did, by the monotonic clock.

    Raises:
      as `run`.
    """
    is_single = alone is not None
    for name in own:
        check_writable(Path(cfg.output_dir) / name)
    placeholder = placeholder_of(cfg)
    validation = cfg.validation_prompt or []
    for prompt in validation:
        text.fill(prompt, placeholder)
    given_names = text.read_names(cfg.celeb_path) if cfg.celeb_path else None
    if is_single and not cfg.resume_from_checkpoint and not cfg.overwrite:
        checkpoint.refuse_checkpoints(Path(cfg.output_dir) / "checkpoints")
    found = hub.resolve(cfg.pretrained_model_name_or_path, cfg.revision, cfg.variant)
    cfg, enhancer = settle(cfg, found.folder)
    is_trained = cfg.max_train_steps > 0
    method = method_of(cfg, enhancer)
    placeholder = replace(placeholder, n=cfg.n_pseudo_tokens)
    validation = [text.fill(prompt, placeholder) for prompt in validation]
    dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    attention = flash.resolve(cfg.attention, jax.local_devices()[0], dtype)
    model = replace(sd.read_configs(found.folder, dtype), attention=attention)
    side, _ = sample.picture_size(model, cfg.resolution, cfg.resolution, ("resolution",) * 2)
    tokenizer, optimizer, start, frozen = None, None, None, None
    if is_trained:
        tokenizer = text.load_tokenizer(
            found.folder / "tokenizer", model.text.vocab_size, model.text.max_position_embeddings
        ).with_placeholder(placeholder.token, placeholder.n)
        text.training_ids(tokenizer)  # here: what is too long is said before weights are read
        optimizer = optimizer_of(cfg, method)
        is_word = tokenizer.is_word
    else:
        text.check_unknown(found.folder / "tokenizer", placeholder)
        is_word = text.word_check(found.folder / "tokenizer")
    if enhancer is None:
        names = given_names or known_names(found.folder)
        start_ids = starting_ids(cfg, method, tokenizer, names)
    eyes = open_eyes(cfg, method, found.folder)
    if enhancer is not None:
        enhancers.check(
            enhancer,
            model,
            enhancers.find(cfg.enhancer, found.folder),
            face_model=eyes.about.face_model,
            num_tokens=placeholder.n,
        )
    if is_single:
        seen = portraits_of(cfg, method, eyes, alone)
        # A checkpoint says for itself whether it is this person's.
        if not cfg.overwrite and not (cfg.resume_from_checkpoint and has_checkpoints(cfg)):
            new = Occupant(placeholder.token, digest_of(seen.pictures), cfg.train_data_dir)
            refuse_another(Path(cfg.output_dir), new)

    room = cfg.steps_per_call or devices.steps_per_call()
    # Of all people, also of those who are done or in another process: one program for all.
    counts = [min(len(p), cfg.pictures_per_person or len(p)) for p in everybody.values()]
    pictures = max(counts)

    if is_trained:
        sd.shapes(model)  # once, before two threads ask for them
        lower = functools.partial(
            *(lower_step, cfg, method, model, optimizer, layout, pictures, side, room),
            enhancer=enhancer,
        )
        with compile_cache.ahead(lower) if own else nullcontext():
            frozen = load_frozen(cfg, found.folder, layout.mesh, enhancer)
        if enhancer is not None:
            sample.warn_of_weights(enhancer, frozen, found.name)
    base = Base(model, frozen, tokenizer, found.name, found.revision)
    if enhancer is None:
        start = starting_tokens(cfg, method, base, start_ids)
    work = Work(
        cfg=cfg,
        method=method,
        base=base,
        optimizer=optimizer,
        enhancer=enhancer,
        start=start,
        side=side,
        eyes=eyes,
        validation=validation,
        layout=layout,
        pictures=pictures,
        room=room,
        about=fingerprint_of(cfg, method, base, eyes, enhancer),
        is_word=is_word,
    )
    if is_single:
        return [train_one(work, alone, seen, started)]
    return train_many(work, everybody, own)


def load_frozen(
    cfg: TrainConfig, checkpoint_folder: Path, mesh: Mesh, enhancer: enhancers.Enhancer | None
) -> sd.Frozen:
    """The frozen weights of a checkpoint, and what of a shared ID-Enhancer is frozen beside them,
    on every device of a mesh.

    Raises:
      WeightsError, UnsupportedConfig: the checkpoint cannot be used.
    """
    # Where they are sharded, the whole of them may be too much for one device.
    host = devices.host() if cfg.shard_frozen else None
    with jax.default_device(host):
        _, frozen = sd.load(
            checkpoint_folder,
            variant=cfg.variant,
            compute_dtype=COMPUTE_DTYPES[cfg.mixed_precision],
        )
    if enhancer is not None:
        frozen = frozen._replace(shared=shared.frozen_part(enhancer.shared))
    return place_frozen(frozen, mesh, cfg.shard_frozen)


def place_frozen(frozen: sd.Frozen, mesh: Mesh, is_sharded: bool) -> sd.Frozen:
    """The frozen weights on every device of a mesh: whole, or split over its axis `data`."""
    return jax.device_put(frozen, frozen_shardings(frozen, mesh, is_sharded))


def frozen_shardings(frozen: sd.Frozen, mesh: Mesh, is_sharded: bool) -> sd.Frozen:
    """Where `place_frozen` puts each weight; of weights or their shapes."""
    if is_sharded:
        specs = shard_specs(frozen, mesh.shape["data"])
    else:
        specs = jax.tree.map(lambda _: P(), frozen)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def frozen_shapes(model: sd.StableDiffusion, enhancer: enhancers.Enhancer | None) -> sd.Frozen:
    """Shapes and types of the frozen weights that people are trained against."""

    def as_type(tree, dtype):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)

    shapes = as_type(sd.shapes(model), model.dtype)
    ours = shared.frozen_part(enhancer.shared) if enhancer is not None else {}
    return shapes._replace(shared=as_type(ours, np.float32))


def lower_step(
    cfg: TrainConfig,
    method: condition.Method,
    model: sd.StableDiffusion,
    optimizer: optax.GradientTransformation,
    layout: devices.Layout,
    pictures: int,
    side: int,
    room: int,
    *,
    enhancer: enhancers.Enhancer | None = None,
) -> jax.stages.Lowered:
    """The program of `Work.step`, from shapes alone: before there are weights.

    The states are those that `begin` makes, the photos those of `encode_pixels` and `group.fill`.

    Args:
      method, ..., room, enhancer: as in `Work`.
    """
    shapes, mesh = frozen_shapes(model, enhancer), layout.mesh

    def one() -> tuple[IdentityState, Photos]:
        start = np.zeros((method.num_tokens, model.text.hidden_size))
        trainable, given = first_values(
            method, model, jax.random.key(0), enhancer, start, np.zeros(faces.WIDTH)
        )
        latents = np.zeros(
            (pictures, 2, *(side // model.vae.downscale,) * 2, model.vae.latent_channels),
            np.float32,
        )
        ids = np.zeros((len(text.TEMPLATES), model.text.max_position_embeddings), np.int32)
        return init_state(optimizer, trainable, given), Photos(latents, latents, np.int32(0), ids)

    of_one = (*jax.eval_shape(one), jax.ShapeDtypeStruct((), np.int32))
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((layout.places, *x.shape), x.dtype), of_one
    )
    states, photos, last = abstract(stacked, NamedSharding(mesh, P("identity")))
    return step_people.lower(
        model,
        method,
        optimizer,
        cfg.train_batch_size,
        mesh,
        cfg.shard_frozen,
        room,
        abstract(shapes, frozen_shardings(shapes, mesh, cfg.shard_frozen)),
        states,
        photos,
        jax.random.key(cfg.seed),
        last,
        np.int32(1),
    )


def train_one(work: Work, person: people.Person, seen: Portraits, started: float) -> Path:
    """Trains the only person of a run; returns the path of the identity file.

    Raises:
      as `run`.
    """
    cfg, folder = work.cfg, Path(work.cfg.output_dir)
    if cfg.overwrite:
        remove_unfinished(cfg, folder)
    learner = begin(work, person, seen, folder)
    if cfg.resume_from_checkpoint:
        resume(learner, cfg, cfg.resume_from_checkpoint)
    signum = train_together(
        cfg,
        work.layout.mesh,
        work.layout.places,
        work.pictures,
        work.room,
        work.step,
        work.evaluate,
        [learner],
        lambda learner: write_results(learner, folder, time.monotonic() - started),
    )
    if learner.error is not None:
        raise learner.error
    step, last = int(learner.state.step), cfg.max_train_steps
    if signum is not None and step < last and not has_plateau(cfg, learner.state):
        raise Interrupted(
            signum,
            f"stopped after step {step} of {last}, which is kept in {learner.checkpoints.folder}; "
            "add --resume_from_checkpoint latest to go on",
        )
    if cfg.push_to_hub:
        results = learner.results
        card = publish.card(
            *(results.token, work.base.name, work.method.profile, step),
            holds_face=work.method.keeps_face,
        )
        token, name = cfg.hub_token, cfg.hub_model_id or folder.resolve().name
        log.info("uploaded to %s", publish.push(folder, card, name, token))
    return folder / jobs.RESULT


def train_many(work: Work, everybody: dict[str, list], own: Sequence[str]) -> list[Path]:
    """Trains people in groups, each in a folder of their own; returns their identity files.

    Who is done already is left alone, and who was interrupted goes on from the last checkpoint.
    Somebody whose photos cannot be used or whose loss is no number is taken out of the group and
    tried once more alone, after all others.

    Args:
      everybody: the pictures of each person of the run.
      own: those whom this process trains.

    Raises:
      JobsError: the folder holds the work of other settings, or results of more steps.
      TrainingError: some people failed; `jobs.jsonl` says why. All others are done.
      Interrupted: SIGINT or SIGTERM; the same command goes on.
      WriteError: the disk is full; the same command goes on.
    """
    cfg, out = work.cfg, Path(work.cfg.output_dir)
    board = jobs.Board(out, list(everybody), own, is_first=jax.process_index() == 0)
    settings = digest_of_settings(work.about)
    if work.enhancer is not None:
        # Who is as predicted can still be trained, whatever decides their steps.
        predicted = digest_of_settings({k: v for k, v in work.about.items() if k in OF_PREDICTION})
        settings = settings if cfg.max_train_steps else predicted
        board.check(settings, cfg.max_train_steps, before=predicted)
    else:
        board.check(settings, cfg.max_train_steps)
    todo = [name for name in own if not board.is_done(name, cfg.max_train_steps)]
    # Of a choice of people the others are not missed.
    gone = board.gone if board.is_first and cfg.identities is None else []
    why = (
        f"photos are gone: {cfg.train_data_dir or cfg.dataset_dir} has nobody of this name; bring "
        f"them back, or delete this person's folder in {out}"
    )
    board.note(gone, status="failed", why=why, ended=time.time())
    board.plan(todo, settings)
    log.info(
        "%d people, %d of them done; %d in a step, %d steps of %d samples, profile %s",
        *(len(own), len(own) - len(todo), work.layout.places),
        *(cfg.max_train_steps, cfg.train_batch_size, work.method.profile),
    )
    done = len(own) - len(todo)

    def train(names, size):
        nonlocal work
        failed = train_group(work, board, everybody, names, size, bar)
        if failed is None:  # and so would be the next group
            work = replace(work, layout=work.layout.halved())
        # The traceback of a failure holds the group's frames, and these all of its arrays.
        if failed is not False:
            gc.collect()

    with tqdm(total=len(own), initial=done, desc="people", unit="person", disable=None) as bar:
        waiting = deque(todo)
        while waiting:
            train(waiting, work.layout.places)
        for name in [name for name in own if board.records[name].status == "failed"]:
            log.warning("once more, alone: %s", name)
            alone = deque([name])
            while alone:
                train(alone, 1)
    devices.await_others(meanwhile=board.publish)
    board.publish()
    mine = [board.records[name] for name in (*own, *gone)]
    failed = [record for record in mine if record.status == "failed"]
    if failed:
        reasons = "; ".join(f"{record.person}: {record.why}" for record in failed[:5])
        raise TrainingError(
            f"{len(failed)} of {len(mine)} people failed, the others are done; the same command "
            f"tries them again. {out / jobs.MANIFEST} says who failed and why. {reasons}"
        )
    return [out / name / jobs.RESULT for name in own]


def train_group(
    work: Work,
    board: jobs.Board,
    everybody: dict[str, list],
    waiting: deque[str],
    size: int,
    bar: tqdm,
) -> bool | None:
    """Takes up to `size` people whose photos can be used from `waiting` and trains them together.

    Returns:
      Whether any of them failed; None if the memory was too small for so many in a step, and could
      do for half of them. They are in `waiting` again then, and go on from their checkpoints.

    Raises:
      Interrupted, WriteError: as `train_many`.
    """
    cfg, out, started = work.cfg, Path(work.cfg.output_dir), time.monotonic()
    before, learners, failed = {}, [], []

    # People of a group are done at the same moment, however long their results take to write.
    end = functools.cache(time.time)

    def seconds_of(name):
        return round(before[name] + time.monotonic() - started, 1)

    def fail(name, error):
        failed.append(name)
        why, now = str(error), time.time()
        log.warning("%s is taken out: %s", name, why)
        board.note([name], status="failed", why=why, seconds=seconds_of(name), ended=now)

    def finish(learner):
        name = learner.person.name
        write_results(learner, out / name, seconds_of(name))
        board.note(
            [name],
            status="done",
            why=None,
            steps=cfg.max_train_steps,
            seconds=seconds_of(name),
            ended=end(),
            result=board.finished(name),
        )
        bar.update()
        speed = jobs.people_per_hour(list(board.records.values()))
        if speed is not None:
            bar.set_postfix_str(f"{speed:.1f} people/hour")

    while waiting and len(learners) < size:
        name = waiting.popleft()
        record = board.records[name]
        before[name] = record.seconds
        board.note([name], status="running", attempts=record.attempts + 1)
        try:
            clean(out / name)
            person = person_of(cfg, name, everybody[name])
            seen = portraits_of(cfg, work.method, work.eyes, person)
            if record.result is None:  # otherwise what lies there is of this very run
                token = placeholder_of(cfg).token
                new = Occupant(token, digest_of(seen.pictures), cfg.train_data_dir)
                refuse_another(out / name, new)
            learner = begin(work, person, seen, out / name)
            with closed_on_error(learner):
                if cfg.max_train_steps:
                    resume(learner, cfg, "latest")
        except WriteError:
            raise
        except PERSON_ERRORS as error:
            fail(name, error)
        else:
            learners.append(learner)
    board.publish()
    if not learners:
        return bool(failed)
    places, pictures = work.layout.places, work.pictures
    calls = work.room, work.step, work.evaluate
    try:
        signum = train_together(cfg, work.layout.mesh, places, pictures, *calls, learners, finish)
    except Exception as error:
        if not devices.is_out_of_memory(error) or work.layout.halved() is None:
            raise
        log.warning("the memory is too small for %d people in a step: half of them", places)
        names = [learner.person.name for learner in learners]
        names = [name for name in names if board.records[name].status == "running"]
        board.note(names, status="waiting")
        waiting.extendleft(reversed(names))
        return None
    for learner in learners:
        name = learner.person.name
        if learner.error is not None:
            fail(name, learner.error)
        elif board.records[name].status != "done":
            board.note([name], status="waiting", seconds=seconds_of(name))
    board.publish()
    left = [name for name in board.own if board.records[name].status != "done"]
    if signum is not None and left:
        raise Interrupted(signum, f"stopped with {len(left)} people left; the same command goes on")
    return bool(failed)


@contextmanager
def closed_on_error(learner: Learner) -> Iterator[None]:
    """Closes the files of somebody who cannot be trained: of many such people there are many."""
    try:
        yield
    except BaseException:
        learner.results.close()
        learner.checkpoints.close()
        raise


def clean(folder: Path) -> None:
    """Removes what a process that was killed left half-written in a person's folder."""
    for path in list(folder.rglob(".tmp-*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def people_of(cfg: TrainConfig) -> dict[str, list]:
    """The pictures of each person of a run, by their name; nothing of them is read yet.

    A folder that has pictures itself is one person, whose name is empty; otherwise each sub-folder
    that is not hidden is one, and so is each identity of a data set.

    Raises:
      ConfigError: the choice of people does not fit a single person.
      images.ImageError, people.PeopleError: there is nobody, or as `choose_people`.
    """
    if cfg.dataset is not None:
        log.info(people.LICENCE)
        return choose_people(cfg, people.from_celeb_a(cfg.dataset_dir))
    folder = Path(cfg.train_data_dir)
    if images.has_only_folders(folder):
        return choose_people(cfg, people.from_folders(folder))
    if cfg.identities is not None:
        raise ConfigError(
            f"--identities chooses people, but {folder} holds the photos of one person; expected a "
            "folder with one folder per person"
        )
    paths, skipped = images.list_images(folder)
    images.report_skipped(skipped)
    return {"": [images.PictureFile(path) for path in paths]}


def choose_people(cfg: TrainConfig, found: dict[str, list]) -> dict[str, list]:
    """The people of a data set that a run trains, with all of their pictures.

    Raises:
      ConfigError: as `people_of`.
      people.PeopleError: nobody is chosen or has enough pictures, or somebody's name is taken.
    """
    if cfg.resume_from_checkpoint not in (None, "latest"):
        raise ConfigError(
            "--resume_from_checkpoint FOLDER is of one person; for several, only latest can be used"
        )
    chosen = people.choose(found, cfg.identities)
    count = cfg.pictures_per_person
    most = max(map(len, chosen.values()))
    # Who has too few is taken out when their turn comes; that nobody has enough is a mistake.
    if count is not None and most < count:
        raise people.PeopleError(
            f"all of the {len(chosen)} people have fewer pictures than --pictures_per_person "
            f"{count}: {most} at most; take a smaller number, or other --identities"
        )
    if jobs.MANIFEST in chosen:
        raise people.PeopleError(
            f"nobody can be called {jobs.MANIFEST}: --output_dir has a file of that name, which "
            "says what became of everybody; rename that person's folder"
        )
    return chosen


def person_of(cfg: TrainConfig, name: str, pictures: list) -> people.Person:
    """A person with those of the pictures that are trained on and those that are held out.

    Pictures that cannot be read are reported and left out.

    Raises:
      images.ImageError, people.PeopleError: no picture can be used, or there are too few.
    """
    found = images.without_copies(images.readable(pictures))
    return people.split(name, found, cfg.pictures_per_person, cfg.seed)


def settle(
    cfg: TrainConfig, checkpoint_folder: Path
) -> tuple[TrainConfig, enhancers.Enhancer | None]:
    """The settings of a run once its checkpoint is here, and the shared ID-Enhancer that people
    begin with, if there is one.

    Raises:
      ConfigError: settings do not fit that there is one, or none.
      EnhancerError: its file cannot be used.
    """
    path = enhancers.find(cfg.enhancer, checkpoint_folder) if cfg.profile == "paper" else None
    if path is None:
        return resolve_config(cfg, None), None
    enhancer = enhancers.read(path)
    log.info("%s", sample.introduce(path, enhancer))
    fixed = {"n_pseudo_tokens": enhancer.config.num_tokens, "beta": enhancer.config.beta}
    return resolve_config(cfg, fixed), enhancer


def method_of(cfg: TrainConfig, enhancer: enhancers.Enhancer | None = None) -> condition.Method:
    """The method that a config asks for.

    Args:
      enhancer: the shared one, if people begin with it.
    """
    if enhancer is not None:
        # Without a step nobody has anything of their own but what was predicted.
        own = cfg.own_parts() if cfg.max_train_steps else ()
        return shared.person_method(
            enhancer.config,
            kv=cfg.kv if "kv" in own else "none",
            kv_rank=cfg.kv_rank,
            own_adapter="adapter" in own,
            regulariser=cfg.regulariser,
            reg_weight=cfg.reg_weight,
        )
    return condition.make_method(
        cfg.profile,
        regulariser=cfg.regulariser,
        kv=cfg.kv,
        kv_rank=cfg.kv_rank,
        num_tokens=cfg.n_pseudo_tokens,
        beta=cfg.beta,
        reg_weight=cfg.reg_weight,
    )


def open_eyes(
    cfg: TrainConfig, method: condition.Method, checkpoint_folder: Path
) -> faces.Finder | face_table.Table | None:
    """What tells the face on a picture; None if none is needed.

    Raises:
      FaceError: a file or a model is missing or cannot be used.
    """
    places = cfg.crop == "face"
    if not method.uses_face and not places:
        return None
    return portraits.open_eyes(cfg, checkpoint_folder, embeds=method.uses_face, places=places)


def portraits_of(
    cfg: TrainConfig,
    method: condition.Method,
    eyes: faces.Finder | face_table.Table | None,
    person: people.Person,
) -> Portraits:
    """Looks at the pictures that a person is trained on.

    Raises:
      FaceError: a picture has no usable face, or none is among the precomputed ones.
    """
    if eyes is None:
        return Portraits(list(person.train), [], None)
    return portraits.look(
        eyes, person.train, embeds=method.uses_face, drop_outliers=cfg.drop_outliers
    )


def known_names(checkpoint_folder: Path) -> list[str]:
    """Names that the text encoder knows: the checkpoint's own list, or the shipped one."""
    own = checkpoint_folder / "names.txt"
    return text.read_names(own) if own.is_file() else text.shipped_names()


def placeholder_of(cfg: TrainConfig) -> text.Placeholder:
    """The person's name in prompts, spelled as the tokenizer will see it."""
    token, notice = text.normalise_placeholder(cfg.placeholder_token)
    if notice:
        log.warning(notice)
    return text.Placeholder(token, cfg.n_pseudo_tokens)


def starting_ids(
    cfg: TrainConfig, method: condition.Method, tokenizer: text.Tokenizer, names: list[str]
) -> np.ndarray:
    """Token ids to start from: int32[N] of words, or int32[K, N] of names.

    One word stands for all pseudo tokens.
    """
    n, words = cfg.n_pseudo_tokens, cfg.initialize_tokens
    if words is None and method.cross_init:
        return text.name_token_ids(tokenizer, names, n)
    words = words or ["person"]
    return text.word_token_ids(tokenizer, words * n if len(words) == 1 else words, n)


def starting_tokens(
    cfg: TrainConfig, method: condition.Method, base: Base, ids: np.ndarray
) -> jax.Array:
    """The pseudo tokens' first value, float32[N, D]; it is the anchor, too."""
    model, frozen, special = base.model, base.frozen, base.tokenizer
    if not method.cross_init:
        start = anchor.from_input_embeddings(model, frozen, ids)
    elif cfg.initialize_tokens is not None:
        start = anchor.from_words(model, frozen, ids, bos=special.bos, eos=special.eos)
    else:
        start = anchor.from_names(
            model, frozen, ids, bos=special.bos, eos=special.eos, pad=special.pad
        )
    check_finite(start, f"the text encoder of {base.name}")
    return start


def check_finite(values: jax.Array | np.ndarray, source: str) -> None:
    """Raises TrainingError if a frozen network gave values that are not finite."""
    if not np.isfinite(values).all():
        raise TrainingError(
            f"{source} gives values that are not finite: check its weights, and use "
            "--mixed_precision no"
        )


def optimizer_of(cfg: TrainConfig, method: condition.Method) -> optax.GradientTransformation:
    """AdamW over the parts that the method trains, at the config's rates."""
    rates, steps, warmup = cfg.rates(), cfg.max_train_steps, cfg.lr_warmup_steps
    return make_optimizer(
        {
            part: rate_over_steps(rates[part], cfg.lr_scheduler, steps, warmup)
            for part in method.parts()
        },
        beta1=cfg.adam_beta1,
        beta2=cfg.adam_beta2,
        epsilon=cfg.adam_epsilon,
        weight_decay=cfg.adam_weight_decay,
    )


def begin(work: Work, person: people.Person, seen: Portraits, folder: Path) -> Learner:
    """A person before the first step: their state, and their photos as the frozen model sees them.

    Args:
      folder: that receives their results.
    """
    cfg, method, base = work.cfg, work.method, work.base
    trainable, given = first_values(
        *(method, base.model, jax.random.key(cfg.seed), work.enhancer, work.start),
        seen.id_embed,
    )
    who = f"{person.name}: " if person.name else ""
    if cfg.max_train_steps:
        photos = encode_pixels(base, training_pixels(cfg, seen, work.side))
        state = init_state(work.optimizer, trainable, given)
        log.info(
            "%sprofile %s, %d photo(s), %s trained values, %d steps of %d samples, learning rates: "
            "%s",
            who,
            method.profile,
            len(seen.pictures),
            f"{count(trainable):,}",
            cfg.max_train_steps,
            cfg.train_batch_size,
            ", ".join(f"{part} {cfg.rates()[part]:g}" for part in method.parts()),
        )
    else:
        photos, none = None, Plateau(np.float32(np.inf), np.int32(0))
        state = IdentityState(trainable, given, (), np.int32(0), none)
        log.info("%sas predicted from %d photo(s), without training", who, len(seen.pictures))
    return Learner(
        person=person,
        state=state,
        photos=photos,
        checkpoints=checkpoint.Checkpoints(
            folder / "checkpoints",
            work.about | {"photos": digest_of(seen.pictures)},
            limit=cfg.checkpoints_total_limit,
        ),
        results=Results(
            *(cfg, method, base, folder, work.validation, work.is_word), enhancer=work.enhancer
        ),
    )


def first_values(
    method: condition.Method,
    model: sd.StableDiffusion,
    key: jax.Array,
    enhancer: enhancers.Enhancer | None,
    start: jax.Array | None,
    id_embed: np.ndarray | None,
) -> tuple[condition.Trainable, condition.Given]:
    """What is trained of a person before the first step, and their constants.

    Args:
      key: the person's key.
      enhancer: the shared one, if the person begins with it.
      start: float32[N, D], the pseudo tokens' first value without it.
      id_embed: float32[512] of unit norm; None where the method needs none.
    """
    if enhancer is not None:
        return shared.begin_person(enhancer.config, method, model, enhancer.shared, key, id_embed)
    given = condition.init_given(method, model, key, start, id_embed)
    return condition.init_trainable(method, model, key, start), given


def has_checkpoints(cfg: TrainConfig) -> bool:
    """Whether there is anything to resume the only person of a run from."""
    return any((Path(cfg.output_dir) / "checkpoints").glob("[0-9]*"))


def resume(learner: Learner, cfg: TrainConfig, which: str) -> None:
    """Sets a learner to the checkpoint asked for; leaves them as they are where there is none yet.

    Raises:
      CheckpointError: as `Checkpoints.restore`, or it is beyond the last step.
    """
    if which == "latest" and not learner.checkpoints.folder.is_dir():
        restored = None
    else:
        restored = learner.checkpoints.restore(learner.state, which)
    who = f"{learner.person.name}: " if learner.person.name else ""
    if restored is None:
        if not who:
            log.warning(
                "no checkpoint in %s yet: starting from the first step", learner.checkpoints.folder
            )
        return
    step, last = int(restored.step), cfg.max_train_steps
    if step > last:
        raise checkpoint.CheckpointError(
            f"the checkpoint is of step {step}, beyond --max_train_steps {last}; ask for more "
            "steps, or name an earlier checkpoint"
        )
    learner.state = restored
    left = "; nothing is left to do" if step == last else ""
    log.info("%sresumed after step %d%s", who, step, left)


def write_results(learner: Learner, folder: Path, seconds: float) -> None:
    """Writes what was learned of a person, all of it or nothing.

    Raises:
      WriteError: it cannot be written.
      IdentityError: it holds values that are not finite.
    """
    results, state = learner.results, learner.state
    before = occupant_of(folder)
    with write_together(folder) as temporary:
        results.save_identity(state, temporary / jobs.RESULT)
        results.save_embeds(state, temporary / learned_embeds.FILE_NAME)
        results.save_webui(state, temporary / "webui")
        photos = learner.checkpoints.fingerprint["photos"]
        results.save_run(int(state.step), seconds, learner.person, photos, temporary)
    if before is not None and before.placeholder not in (None, results.token):
        remove_finished(folder, trigger_of(before.placeholder, results.is_word))
    trigger = trigger_of(results.token, results.is_word)
    log.info(
        "%sin AUTOMATIC1111 the word is %s, in ComfyUI embedding:%s, with the file in %s",
        f"{learner.person.name}: " if learner.person.name else "",
        *(trigger, trigger, folder / "webui"),
    )


def training_pixels(
    cfg: TrainConfig, seen: Portraits, side: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, float32[side, side, 3] in [-1, 1]) of each picture of a person.

    After the last one, those are reported whose face is too small to be more than a blur.
    """
    small = []
    for index, picture in enumerate(seen.pictures):
        image = picture.read()
        if cfg.crop == "face":
            points = seen.sights[index].points
            centre, width, angle = faces.training_square(points, image.size, cfg.crop_margin)
            image = images.crop_turned(image, centre, width, angle)
            if width < side / 2:
                small.append(f"{picture} ({width} pixels)")
        yield picture.name, images.to_pixels(image, side, center_crop=cfg.center_crop)
    if small:
        log.warning(
            "on %d of %d photos the square around the face is smaller than half of the %d pixels "
            "that it is scaled up to, so what is learned will be soft: %s; take photos with a "
            "larger face, or a smaller --resolution",
            *(len(small), len(seen.pictures), side, ", ".join(small[:5])),
        )


def encode_pixels(base: Base, pictures: Iterable[tuple[str, np.ndarray]]) -> Photos:
    """Encodes every picture and its mirror once; the steps only draw from these moments.

    The mirror is encoded too, because the VAE of a mirrored picture is not the mirrored VAE.

    Args:
      pictures: name and float32[side, side, 3] in [-1, 1] of each.
    """
    model = base.model
    means, logvars = [], []
    for name, pixels in pictures:
        mean, logvar = _encode_image(model, base.frozen, np.stack([pixels, pixels[:, ::-1]]))
        check_finite(np.stack([mean, logvar]), f"the VAE of {base.name}, for {name},")
        means.append(np.asarray(mean))
        logvars.append(np.asarray(logvar))
    return Photos(
        mean=jax.numpy.asarray(np.stack(means)),
        logvar=jax.numpy.asarray(np.stack(logvars)),
        count=jax.numpy.int32(len(means)),
        token_ids=jax.numpy.asarray(text.training_ids(base.tokenizer)),
    )


# One program for all pictures, and for all people of a process.
_encode_image = jax.jit(sd.encode_image, static_argnums=0)


def fingerprint_of(
    cfg: TrainConfig,
    method: condition.Method,
    base: Base,
    eyes: faces.Finder | face_table.Table | None,
    enhancer: enhancers.Enhancer | None = None,
) -> dict[str, object]:
    """What a resumed run must share with the run that wrote the checkpoint, but for the photos."""
    settings = {k: v for k, v in asdict(cfg).items() if k not in FREE_ON_RESUME}
    settings |= {name: None for name, value in SINCE.items() if settings[name] == value}
    if cfg.lr_scheduler != "constant":  # then the rate of every step depends on how many there are
        settings["max_train_steps"] = cfg.max_train_steps
    settings["enhancer_sha256"] = enhancer.sha256 if enhancer is not None else None
    if base.frozen is not None:
        settings["base_weights"] = checkpoint.tree_digest(base.frozen.cross_kv)
    names = {"celeb_path": file_digest(cfg.celeb_path)} if cfg.celeb_path else {}
    # By what it is, since `paper` had another one before it could be chosen. The others' own goes
    # without saying, as in the checkpoints from then; without a weight it does not matter.
    own = condition.make_method(cfg.profile).regulariser
    is_said = cfg.reg_weight and (cfg.profile == "paper" or method.regulariser != own)
    settings["regulariser"] = method.regulariser if is_said else None
    seen = asdict(eyes.about) if eyes is not None else {}
    if seen.get("looks") == 1:  # as in checkpoints from before there was a second look
        seen["looks"] = None
    if not method.uses_face:  # then a recogniser is not loaded, but precomputed faces had one
        seen.pop("face_model", None)
    return {
        **settings,
        **names,
        **seen,
        "base_model": base.name,
        "revision": base.revision,
    }


def digest_of_settings(about: dict[str, object]) -> str:
    """One SHA-256 of a fingerprint, hexadecimal; what is None and came later does not count."""
    return jobs.digest({k: v for k, v in about.items() if k not in LATER or v is not None})


def digest_of(pictures: list) -> str:
    """One SHA-256 of the pictures of a person, hexadecimal."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(picture.sha256().encode())
    return digest.hexdigest()
