"""Learning people: photos in, identity files out."""

import functools
import gc
import hashlib
import logging
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
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
    sample,
)
from idea_jax.config import COMPUTE_DTYPES, ConfigError, TrainConfig
from idea_jax.data import images, people, text
from idea_jax.files import WriteError, check_writable, file_digest, write_together
from idea_jax.group import Learner, has_plateau, train_together
from idea_jax.method import anchor, condition
from idea_jax.models import flash, hub, sd
from idea_jax.pytrees import abstract, count
from idea_jax.results import Base, Results, TrainingError
from idea_jax.signals import Interrupted
from idea_jax.train_step import (
    IdentityState,
    Photos,
    evaluate_people,
    init_state,
    make_optimizer,
    shard_specs,
    step_people,
)

log = logging.getLogger(__name__)

# Settings that may differ between a run and its resumption: they do not touch the numbers.
FREE_ON_RESUME = frozenset(
    {
        *("pretrained_model_name_or_path", "variant", "train_data_dir", "output_dir"),
        *("dataset", "dataset_dir", "identities"),
        *("preset", "celeb_path", "max_train_steps", "save_steps", "only_save_embeds"),
        # How faces were found is compared by what did it: see fingerprint_of.
        *("face_model", "face_model_dir", "accept_face_licence", "face_embeddings"),
        # A GPU moves embeddings by rounding alone, and precomputed faces do not say where they ran.
        "face_provider",
        *("validation_prompt", "validation_steps", "num_validation_images"),
        *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
        *("report_to", "logging_dir", "compile_cache", "attention"),
        # Who is trained beside whom, and where, moves results by rounding alone.
        *("identities_per_step", "mesh", "shard_frozen", "distributed", "steps_per_call"),
    }
)

# What can be wrong with one person of many, and does not concern the others.
PERSON_ERRORS = (
    images.ImageError,
    people.PeopleError,
    face_models.FaceError,
    checkpoint.CheckpointError,
    TrainingError,
    OSError,
)


@dataclass(frozen=True)
class Portraits:
    """One person as training sees them.

    Attributes:
        pictures: those to train on.
        sights: the face on each of them; empty where no face is needed.
        id_embed: float32[512] of unit norm; None where the method uses none.
    """

    pictures: list
    sights: list[face_table.Sight]
    id_embed: np.ndarray | None


@dataclass(frozen=True)
class Work:
    """What the training of every person of a run has in common."""

    cfg: TrainConfig
    method: condition.Method
    base: Base
    optimizer: optax.GradientTransformation
    start: jax.Array  # float32[N, D], the pseudo tokens' first value
    side: int  # of the training images, in pixels
    eyes: faces.Finder | face_table.Table | None
    validation: list[str]
    layout: devices.Layout
    pictures: int  # that the compiled step has places for
    room: int  # steps that one call takes at most
    about: dict  # the fingerprint of a person, but for their photos

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
      UnsupportedConfig, CheckpointError, DevicesError, JobsError: bad input, found before training
      starts; of several people, what concerns one of them alone is a `TrainingError` at the end.
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
    face_models.check_select(cfg.face_select)
    everybody = people_of(cfg)
    devices.check_same_people(list(everybody))
    is_single = list(everybody) == [""]
    alone = person_of(cfg, "", everybody[""]) if is_single else None
    own = devices.own_share(list(everybody))
    if is_single and cfg.distributed:
        raise ConfigError("--distributed is for several people: each process trains its own")
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
    method = method_of(cfg)
    placeholder = placeholder_of(cfg)
    validation = [text.fill(prompt, placeholder) for prompt in cfg.validation_prompt or []]
    given_names = text.read_names(cfg.celeb_path) if cfg.celeb_path else None
    if is_single and not cfg.resume_from_checkpoint:
        checkpoint.refuse_checkpoints(Path(cfg.output_dir) / "checkpoints")
    found = hub.resolve(cfg.pretrained_model_name_or_path, cfg.revision, cfg.variant)
    dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    attention = flash.resolve(cfg.attention, jax.local_devices()[0], dtype)
    model = replace(sd.read_configs(found.folder, dtype), attention=attention)
    side, _ = sample.picture_size(model, cfg.resolution, cfg.resolution, ("resolution",) * 2)
    tokenizer = text.load_tokenizer(
        found.folder / "tokenizer", model.text.vocab_size, model.text.max_position_embeddings
    ).with_placeholder(placeholder.token, placeholder.n)
    names = given_names or known_names(found.folder)
    start_ids = starting_ids(cfg, method, tokenizer, names)
    eyes = open_eyes(cfg, method, found.folder)
    if is_single:
        seen = portraits_of(cfg, method, eyes, alone)

    optimizer, room = optimizer_of(cfg, method), cfg.steps_per_call or devices.steps_per_call()
    # Of all people, also of those who are done or in another process: one program for all.
    counts = [min(len(p), cfg.pictures_per_person or len(p)) for p in everybody.values()]
    pictures = max(counts)

    # The frozen model
    # Where they are sharded, the whole of them may be too much for one device.
    host = devices.host() if cfg.shard_frozen else None
    sd.shapes(model)  # once, before two threads ask for them
    lower = functools.partial(
        *(lower_step, cfg, method, model, optimizer, layout, pictures, side, room)
    )
    with compile_cache.ahead(lower) if own else nullcontext():
        with jax.default_device(host):
            _, frozen = sd.load(found.folder, variant=cfg.variant, compute_dtype=dtype)
        frozen = place_frozen(frozen, layout.mesh, cfg.shard_frozen)
    base = Base(model, frozen, tokenizer, found.name, found.revision)
    work = Work(
        cfg=cfg,
        method=method,
        base=base,
        optimizer=optimizer,
        start=starting_tokens(cfg, method, base, start_ids),
        side=side,
        eyes=eyes,
        validation=validation,
        layout=layout,
        pictures=pictures,
        room=room,
        about=fingerprint_of(cfg, method, base, eyes),
    )
    if is_single:
        return [train_one(work, alone, seen, started)]
    return train_many(work, everybody, own)


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


def lower_step(
    cfg: TrainConfig,
    method: condition.Method,
    model: sd.StableDiffusion,
    optimizer: optax.GradientTransformation,
    layout: devices.Layout,
    pictures: int,
    side: int,
    room: int,
) -> jax.stages.Lowered:
    """The program of `Work.step`, from shapes alone: before there are weights.

    The states are those that `begin` makes, the photos those of `encode_pixels` and `group.fill`.

    Args:
      method, ..., room: as in `Work`.
    """
    shapes, mesh = sd.shapes(model), layout.mesh

    def one() -> tuple[IdentityState, Photos]:
        key, start = jax.random.key(0), np.zeros((method.num_tokens, model.text.hidden_size))
        given = condition.init_given(method, model, key, start, np.zeros(faces.WIDTH))
        trainable = condition.init_trainable(method, model, key, start)
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
        abstract(shapes, frozen_shardings(shapes, mesh, cfg.shard_frozen), model.dtype),
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
    settings = jobs.digest(work.about)
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

    def train(names, places):
        # The traceback of a failure holds the group's frames, and these all of its arrays.
        if train_group(work, board, everybody, names, places, bar):
            gc.collect()

    with tqdm(total=len(own), initial=done, desc="people", unit="person", disable=None) as bar:
        waiting = deque(todo)
        while waiting:
            train(waiting, work.layout.places)
        for name in [name for name in own if board.records[name].status == "failed"]:
            log.warning("once more, alone: %s", name)
            train(deque([name]), 1)
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
) -> bool:
    """Takes up to `size` people whose photos can be used from `waiting` and trains them together.

    Returns:
      Whether any of them failed.

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
            learner = begin(work, person, seen, out / name)
            with closed_on_error(learner):
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
    signum = train_together(cfg, work.layout.mesh, places, pictures, *calls, learners, finish)
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


def method_of(cfg: TrainConfig) -> condition.Method:
    """The method that a config asks for."""
    return condition.make_method(
        cfg.profile,
        regulariser=cfg.regulariser,
        kv=cfg.kv,
        kv_rank=cfg.kv_rank,
        num_tokens=cfg.n_pseudo_tokens,
        beta=cfg.beta,
        reg_weight=cfg.reg_weight,
    )


def find_face_model(
    face_model: str | None,
    checkpoint_folder: Path,
    face_model_dir: str | None = None,
    *,
    accept_licence: bool = False,
) -> Path:
    """The ArcFace file of a run: the one given, the checkpoint's own, or an installed pack's.

    Raises:
      FaceError: there is none; see `face_models.find_recogniser`.
    """
    return face_models.find_recogniser(
        face_model, face_model_dir, checkpoint_folder / "face", accept_licence=accept_licence
    )


def open_eyes(
    cfg: TrainConfig, method: condition.Method, checkpoint_folder: Path
) -> faces.Finder | face_table.Table | None:
    """What tells the face on a picture: computed before, or found now; None if none is needed.

    Raises:
      FaceError: a file or a model is missing or cannot be used.
    """
    if not method.uses_face and cfg.crop != "face":
        return None
    if cfg.face_embeddings is not None:
        return face_table.read(cfg.face_embeddings)
    path = find_face_model(
        cfg.face_model,
        checkpoint_folder,
        cfg.face_model_dir,
        accept_licence=cfg.accept_face_licence,
    )
    # A pack must have a detector; a recogniser that was given alone, or by a checkpoint, need not.
    alone = cfg.face_model is not None or path.parent == checkpoint_folder / "face"
    return faces.open_finder(
        path,
        provider=cfg.face_provider,
        select=cfg.face_select,
        pre_aligned=cfg.pre_aligned,
        embeds=method.uses_face,
        needs_detector=not alone or cfg.crop == "face" or cfg.face_select != "largest",
    )


def portraits_of(
    cfg: TrainConfig,
    method: condition.Method,
    eyes: faces.Finder | face_table.Table | None,
    person: people.Person,
) -> Portraits:
    """Looks at a person's pictures; leaves out those of somebody else, if asked to.

    Of precomputed faces, pictures without a row are reported and left out: they were named when the
    table was made.

    Raises:
      FaceError: a picture has no usable face, or none is among the precomputed ones.
    """
    pictures = list(person.train)
    if eyes is None:
        return Portraits(pictures, [], None)
    shown = tqdm(pictures, desc="faces", unit="img", leave=False, disable=None)
    looked, missing = [], []
    for picture in shown:
        try:
            looked.append((picture, eyes.look(picture)))
        except faces.FaceError as error:
            if not isinstance(eyes, face_table.Table):
                raise
            missing.append(error)
    if not looked:
        raise missing[0]
    for error in missing:
        log.warning("left out: %s", error)
    pictures, sights = [picture for picture, _ in looked], [sight for _, sight in looked]
    if not method.uses_face:
        return Portraits(pictures, sights, None)
    embeds = np.stack([sight.embed for sight in sights])
    unlike, similarities = faces.unlike(embeds)
    for index in np.flatnonzero(unlike):
        log.warning(
            "%s is unlike the other photos (similarity %.2f to their mean, %.2f is usual here): "
            "another person, or another face on it? %s",
            pictures[index].name,
            similarities[index],
            np.median(similarities),
            "It is left out" if cfg.drop_outliers else "--drop_outliers leaves it out",
        )
    if cfg.drop_outliers:
        kept = np.flatnonzero(~unlike)
        pictures, sights = [pictures[i] for i in kept], [sights[i] for i in kept]
        embeds = embeds[kept]
    return Portraits(pictures, sights, faces.mean_embedding(embeds))


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
    rates = cfg.rates()
    return make_optimizer(
        {part: rates[part] for part in method.parts()},
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
    key = jax.random.key(cfg.seed)
    given = condition.init_given(method, base.model, key, work.start, seen.id_embed)
    trainable = condition.init_trainable(method, base.model, key, work.start)
    photos = encode_pixels(base, training_pixels(cfg, seen, work.side))
    log.info(
        "%sprofile %s, %d photo(s), %s trained values, %d steps of %d samples, learning rates: %s",
        f"{person.name}: " if person.name else "",
        method.profile,
        len(seen.pictures),
        f"{count(trainable):,}",
        cfg.max_train_steps,
        cfg.train_batch_size,
        ", ".join(f"{part} {cfg.rates()[part]:g}" for part in method.parts()),
    )
    return Learner(
        person=person,
        state=init_state(work.optimizer, trainable, given),
        photos=photos,
        checkpoints=checkpoint.Checkpoints(
            folder / "checkpoints",
            work.about | {"photos": digest_of(seen.pictures)},
            limit=cfg.checkpoints_total_limit,
        ),
        results=Results(cfg, method, base, folder, work.validation),
    )


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
    with write_together(folder) as temporary:
        results.save_identity(state, temporary / jobs.RESULT)
        results.save_embeds(state, temporary / learned_embeds.FILE_NAME)
        results.save_webui(state, temporary / "webui")
        results.save_run(int(state.step), seconds, learner.person, temporary)


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
    prompts = text.training_prompts(base.tokenizer.placeholders[0])
    return Photos(
        mean=jax.numpy.asarray(np.stack(means)),
        logvar=jax.numpy.asarray(np.stack(logvars)),
        count=jax.numpy.int32(len(means)),
        token_ids=jax.numpy.asarray(base.tokenizer(prompts)),
    )


# One program for all pictures, and for all people of a process.
_encode_image = jax.jit(sd.encode_image, static_argnums=0)


def fingerprint_of(
    cfg: TrainConfig,
    method: condition.Method,
    base: Base,
    eyes: faces.Finder | face_table.Table | None,
) -> dict[str, object]:
    """What a resumed run must share with the run that wrote the checkpoint, but for the photos."""
    settings = {k: v for k, v in asdict(cfg).items() if k not in FREE_ON_RESUME}
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
        "base_weights": checkpoint.tree_digest(base.frozen.cross_kv),
    }


def digest_of(pictures: list) -> str:
    """One SHA-256 of the pictures of a person, hexadecimal."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(picture.sha256().encode())
    return digest.hexdigest()
