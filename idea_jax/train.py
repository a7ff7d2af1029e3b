"""Learning one person: photos in, identity file out."""

import functools
import hashlib
import logging
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np
import optax
from tqdm import tqdm

from idea_jax import (
    checkpoint,
    face_models,
    face_table,
    faces,
    learned_embeds,
    sample,
    tensorboard,
)
from idea_jax.config import COMPUTE_DTYPES, ConfigError, TrainConfig, to_yaml
from idea_jax.data import images, people, text
from idea_jax.files import atomic_write, check_writable, slug, write_together
from idea_jax.method import anchor, condition
from idea_jax.models import flash, hub, sd
from idea_jax.pytrees import count
from idea_jax.train_step import (
    IdentityState,
    Metrics,
    Photos,
    draw_batch,
    init_state,
    make_optimizer,
    train_step,
)

log = logging.getLogger(__name__)

# Settings that may differ between a run and its resumption: they do not touch the numbers.
FREE_ON_RESUME = frozenset(
    {
        *("pretrained_model_name_or_path", "variant", "train_data_dir", "output_dir"),
        *("dataset", "dataset_dir", "identities"),
        *("celeb_path", "max_train_steps", "save_steps", "only_save_embeds"),
        # How faces were found is compared by what did it: see fingerprint_of.
        *("face_model", "face_model_dir", "accept_face_licence", "face_embeddings"),
        *("validation_prompt", "validation_steps", "num_validation_images"),
        *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
        *("report_to", "logging_dir", "compile_cache", "attention"),
    }
)


class TrainingError(RuntimeError):
    """The loss is no longer a number."""


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint has been written."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


@dataclass(frozen=True)
class Base:
    """What a run needs besides the person: the frozen model and its tokenizer."""

    model: sd.StableDiffusion
    frozen: sd.Frozen
    tokenizer: text.Tokenizer  # knows the placeholder
    name: str
    revision: str | None


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


def run(cfg: TrainConfig) -> list[Path]:
    """Trains one person, or several one after the other; returns the paths of the identity files.

    The files of one person are in `output_dir`, those of several in a folder each in it.

    Raises:
      ConfigError, ImageError, PeopleError, FaceError, TextError, CheckpointNotFound, WeightsError,
      UnsupportedConfig, CheckpointError: bad input, found before training starts.
      TrainingError: the loss became non-finite; the last good identity is on disk.
      Interrupted: SIGINT or SIGTERM; a checkpoint is on disk.
    """
    # What can be wrong and is cheap to see comes first.
    started = time.monotonic()
    people.places(cfg.identities)
    face_models.check_select(cfg.face_select)
    everybody = people_of(cfg)
    output_dirs = [Path(cfg.output_dir) / person.name for person in everybody]
    for folder in output_dirs:
        check_writable(folder)
    method = method_of(cfg)
    placeholder = placeholder_of(cfg)
    validation = [text.fill(prompt, placeholder) for prompt in cfg.validation_prompt or []]
    given_names = text.read_names(cfg.celeb_path) if cfg.celeb_path else None
    if not cfg.resume_from_checkpoint:
        for folder in output_dirs:
            checkpoint.refuse_checkpoints(folder / "checkpoints")
    found = hub.resolve(cfg.pretrained_model_name_or_path, cfg.revision, cfg.variant)
    dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    attention = flash.resolve(cfg.attention, jax.default_backend(), dtype)
    model = sd.read_configs(found.folder, dtype)
    side, _ = sample.picture_size(model, cfg.resolution, cfg.resolution, ("resolution",) * 2)
    tokenizer = text.load_tokenizer(
        found.folder / "tokenizer", model.text.vocab_size, model.text.max_position_embeddings
    ).with_placeholder(placeholder.token, placeholder.n)
    names = given_names or known_names(found.folder)
    start_ids = starting_ids(cfg, method, tokenizer, names)
    eyes = open_eyes(cfg, method, found.folder)
    portraits = [portraits_of(cfg, method, eyes, person) for person in everybody]

    # The frozen model
    model, frozen = sd.load(found.folder, variant=cfg.variant, compute_dtype=dtype)
    model = replace(model, attention=attention)
    base = Base(model, frozen, tokenizer, found.name, found.revision)
    start = starting_tokens(cfg, method, base, start_ids)
    optimizer = optimizer_of(cfg, method)

    # The people
    written = []
    for person, seen, folder in zip(everybody, portraits, output_dirs, strict=True):
        if person.name:
            log.info("%s (%d of %d)", person.name, len(written) + 1, len(everybody))
        results = Results(cfg, method, base, folder, validation)
        state, photos = begin(cfg, method, base, optimizer, start, seen, side)
        key = jax.random.key(cfg.seed)
        fingerprint = fingerprint_of(cfg, base, seen.pictures, eyes)
        state, metrics = loop(
            cfg, method, base, optimizer, state, photos, key, fingerprint, results
        )
        with write_together(folder) as temporary:
            results.save_identity(state, temporary / "identity.safetensors")
            results.save_embeds(state, temporary / learned_embeds.FILE_NAME)
            results.save_webui(state, temporary / "webui")
            seconds = time.monotonic() - started
            results.save_run(metrics, int(state.step), seconds, person, temporary)
        written.append(folder / "identity.safetensors")
        started = time.monotonic()
    return written


def people_of(cfg: TrainConfig) -> list[people.Person]:
    """Finds the people of a run and proves that each of their picture files can be read.

    A folder that has pictures itself is one person, without a name; otherwise each sub-folder with
    pictures is one, and so is each identity of a data set.

    Raises:
      ConfigError: the choice of people does not fit a single person.
      images.ImageError, people.PeopleError: there is nobody, or a picture cannot be used.
    """
    if cfg.dataset is not None:
        log.info("CelebA is for non-commercial research only; do not pass its pictures on")
        found = people.from_celeb_a(cfg.dataset_dir)
        return choose_people(cfg, found)
    folder = Path(cfg.train_data_dir)
    if images.has_only_folders(folder):
        everybody = choose_people(cfg, people.from_folders(folder))
        for person in everybody:
            for picture in person.train:
                picture.read()
        return everybody
    if cfg.identities is not None:
        raise ConfigError(
            f"--identities chooses people, but {folder} holds the photos of one person; expected a "
            "folder with one folder per person"
        )
    paths, skipped = images.list_images(folder)
    images.report_skipped(skipped)
    pictures = [images.PictureFile(path) for path in paths]
    for picture in pictures:
        picture.read()
    return [people.split("", images.without_copies(pictures), cfg.pictures_per_person, cfg.seed)]


def choose_people(cfg: TrainConfig, found: dict[str, list]) -> list[people.Person]:
    """The people of a data set that a run trains, their pictures split into two parts.

    Raises:
      ConfigError: as `people_of`.
      people.PeopleError: nobody is chosen, or some have too few pictures; it names all of them.
    """
    if cfg.resume_from_checkpoint not in (None, "latest"):
        raise ConfigError(
            "--resume_from_checkpoint FOLDER is of one person; for several, only latest can be used"
        )
    chosen = {
        name: images.without_copies(pictures)
        for name, pictures in people.choose(found, cfg.identities).items()
    }
    count = cfg.pictures_per_person
    numbers = {name: len(pictures) for name, pictures in chosen.items()}
    few = [f"{name} ({n})" for name, n in numbers.items() if count is not None and n < count]
    if few:
        raise people.PeopleError(
            f"{len(few)} of {len(chosen)} people have fewer pictures than --pictures_per_person "
            f"{count}: {', '.join(few)}; take a smaller number, or other --identities"
        )
    return [people.split(name, pictures, count, cfg.seed) for name, pictures in chosen.items()]


def method_of(cfg: TrainConfig) -> condition.Method:
    """The method that a config asks for."""
    return condition.make_method(
        cfg.profile,
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


def begin(
    cfg: TrainConfig,
    method: condition.Method,
    base: Base,
    optimizer: optax.GradientTransformation,
    start: jax.Array,
    seen: Portraits,
    side: int,
) -> tuple[IdentityState, Photos]:
    """A person's state before the first step, and their photos as the frozen model sees them."""
    key = jax.random.key(cfg.seed)
    given = condition.init_given(method, base.model, key, start, seen.id_embed)
    trainable = condition.init_trainable(method, base.model, base.frozen.cross_kv, key, start)
    state = init_state(optimizer, trainable, given)
    photos = encode_pixels(base, training_pixels(cfg, seen, side))
    log.info(
        "profile %s, %d photo(s), %s trained values, %d steps of %d samples, learning rates: %s",
        method.profile,
        len(seen.pictures),
        f"{count(trainable):,}",
        cfg.max_train_steps,
        cfg.train_batch_size,
        ", ".join(f"{part} {cfg.rates()[part]:g}" for part in method.parts()),
    )
    return state, photos


def training_pixels(
    cfg: TrainConfig, seen: Portraits, side: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, float32[side, side, 3] in [-1, 1]) of each picture of a person."""
    for index, picture in enumerate(seen.pictures):
        image = picture.read()
        if cfg.crop == "face":
            square = faces.training_square(seen.sights[index].points, image.size)
            image = images.crop_square(image, square)
        yield picture.name, images.to_pixels(image, side, center_crop=cfg.center_crop)


def encode_photos(base: Base, paths: list[Path], side: int, center_crop: bool) -> Photos:
    """Encodes picture files as `encode_pixels` does."""
    return encode_pixels(
        base,
        (
            (path.name, images.to_pixels(images.read_image(path), side, center_crop=center_crop))
            for path in paths
        ),
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
    base: Base,
    pictures: list,
    eyes: faces.Finder | face_table.Table | None,
) -> dict[str, object]:
    """What a resumed run must share with the run that wrote the checkpoint."""
    settings = {k: v for k, v in asdict(cfg).items() if k not in FREE_ON_RESUME}
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(picture.sha256().encode())
    names = {"celeb_path": checkpoint.file_digest(Path(cfg.celeb_path))} if cfg.celeb_path else {}
    return {
        **settings,
        **names,
        **(asdict(eyes.about) if eyes is not None else {}),
        "photos": digest.hexdigest(),
        "base_model": base.name,
        "revision": base.revision,
        "base_weights": checkpoint.tree_digest(base.frozen.cross_kv),
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def draw_and_step(
    model: sd.StableDiffusion,
    method: condition.Method,
    optimizer: optax.GradientTransformation,
    size: int,
    frozen: sd.Frozen,
    state: IdentityState,
    photos: Photos,
    key: jax.Array,
) -> tuple[IdentityState, Metrics]:
    """Draws the batch of the state's step and takes the step: one program, one dispatch.

    Compiled once for all people who are trained with the same method and optimiser object.
    """
    batch = draw_batch(model, photos, key, state.step, size)
    return train_step(model, method, optimizer, frozen, state, batch)


def loop(
    cfg: TrainConfig,
    method: condition.Method,
    base: Base,
    optimizer: optax.GradientTransformation,
    state: IdentityState,
    photos: Photos,
    key: jax.Array,
    fingerprint: dict[str, object],
    results: "Results",
) -> tuple[IdentityState, Metrics | None]:
    """Takes all steps; returns the final state and the last step's metrics (None: no step left).

    Raises:
      TrainingError: a step was not finite.
      Interrupted: a signal came; the step under way was finished and a checkpoint written.
    """
    step_fn = functools.partial(draw_and_step, base.model, method, optimizer, cfg.train_batch_size)
    checkpoints = checkpoint.Checkpoints(
        results.output_dir / "checkpoints", fingerprint, limit=cfg.checkpoints_total_limit
    )
    metrics = pending = None
    try:
        if cfg.resume_from_checkpoint:
            state = resume(checkpoints, state, cfg)
        first, last = int(state.step), cfg.max_train_steps
        with results.progress(first) as bar, noted_signals() as signals:
            for step in range(first + 1, last + 1):
                state, metrics = step_fn(base.frozen, state, photos, key)
                # The step before is read while this one runs, so the device never waits.
                if pending is not None:
                    results.report(bar, step - 1, pending, state)
                pending = metrics
                if results.is_due(step) or step == last or signals:
                    results.report(bar, step, pending, state)
                    pending = None
                    results.save_on_the_way(step, state)
                is_last = step == last and cfg.checkpointing_steps > 0
                if is_last or is_multiple(step, cfg.checkpointing_steps) or signals:
                    checkpoints.save(state)
                if signals and step < last:
                    raise Interrupted(
                        signals[0],
                        f"stopped after step {step} of {last}, which is kept in "
                        f"{checkpoints.folder}; add --resume_from_checkpoint latest to go on",
                    )
    finally:
        checkpoints.close()
        results.close()
    return state, metrics


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the step under way can end; a second one stops at once.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    noted: list[int] = []

    def note(signum, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(signum)
        log.warning("stopping after this step; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_multiple(step: int, every: int) -> bool:
    """Whether something that happens every N steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


def resume(
    checkpoints: checkpoint.Checkpoints, state: IdentityState, cfg: TrainConfig
) -> IdentityState:
    """Returns the state of the checkpoint asked for; the state itself where there is none yet."""
    restored = checkpoints.restore(state, cfg.resume_from_checkpoint)
    if restored is None:
        log.warning("no checkpoint in %s yet: starting from the first step", checkpoints.folder)
        return state
    step, last = int(restored.step), cfg.max_train_steps
    if step > last:
        raise checkpoint.CheckpointError(
            f"the checkpoint is of step {step}, beyond --max_train_steps {last}; ask for more "
            "steps, or name an earlier checkpoint"
        )
    log.info("resumed after step %d%s", step, "; nothing is left to do" if step == last else "")
    return restored


class Results:
    """Everything a run shows and writes: progress, losses, grids, identities."""

    def __init__(
        self,
        cfg: TrainConfig,
        method: condition.Method,
        base: Base,
        output_dir: Path,
        validation: list[str],
    ):
        self.cfg, self.method, self.base, self.output_dir = cfg, method, base, output_dir
        self.losses: list[tuple[int, float]] = []
        self.log = None
        if cfg.report_to == "tensorboard":
            self.log = tensorboard.Log(output_dir / cfg.logging_dir)
        self.validation_ids = base.tokenizer([*validation, ""]) if validation else None

    def progress(self, first: int) -> tqdm:
        """A bar that counts samples; it is silent where standard error is no terminal."""
        size = self.cfg.train_batch_size
        total = self.cfg.max_train_steps * size
        return tqdm(total=total, initial=first * size, unit="img", disable=None)

    def report(self, bar: tqdm, step: int, metrics: Metrics, state: IdentityState) -> None:
        """Shows one step's metrics.

        Raises:
          TrainingError: the step was not finite; the state, which such a step leaves as it was,
            has been saved, unless it is the first one.
        """
        values = {k: float(v) for k, v in metrics._asdict().items()}
        if not values["finite"]:
            raise TrainingError(
                f"step {step}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}; "
                f"stopped. {self.save_last_good(state)}, or use --mixed_precision no"
            )
        self.losses.append((step, values["loss"]))
        bar.update(self.cfg.train_batch_size)
        bar.set_postfix_str(f"step {step}, loss {values['loss']:.4f}", refresh=False)
        if bar.disable and is_multiple(step, max(1, self.cfg.max_train_steps // 10)):
            log.info("step %d of %d: loss %.4f", step, self.cfg.max_train_steps, values["loss"])
        if self.log:
            names = ("loss", "denoising", "regulariser", "grad_norm")
            self.log.scalars({f"train/{name}": values[name] for name in names}, step)

    def save_last_good(self, state: IdentityState) -> str:
        """Writes the state before a step that was not finite; says where it is and what to do."""
        good = int(state.step)
        if good == 0:
            return f"No step was finite: check the weights of {self.base.name}"
        path = self.output_dir / f"identity-steps-{good}.safetensors"
        try:
            self.save_identity(state, path)
        except checkpoint.IdentityError:
            return f"Step {good} had left values that are not finite. Lower the learning rate"
        return f"The identity after step {good} is in {path}. Lower the learning rate"

    def is_due(self, step: int) -> bool:
        """Whether anything is saved or drawn at this step."""
        cfg = self.cfg
        validates = self.validation_ids is not None and is_multiple(step, cfg.validation_steps)
        every = (cfg.save_steps, cfg.checkpointing_steps)
        return validates or any(is_multiple(step, n) for n in every)

    def save_on_the_way(self, step: int, state: IdentityState) -> None:
        """Writes the identity and the validation grids of a step where they are due."""
        cfg = self.cfg
        if is_multiple(step, cfg.save_steps):
            self.save_embeds(state, self.output_dir / f"learned_embeds-steps-{step}.safetensors")
            if not cfg.only_save_embeds:
                self.save_identity(state, self.output_dir / f"identity-steps-{step}.safetensors")
        if self.validation_ids is not None and is_multiple(step, cfg.validation_steps):
            self.validate(step, state)

    def validate(self, step: int, state: IdentityState) -> None:
        """Draws the validation prompts with the current state, one grid per prompt."""
        cfg, base = self.cfg, self.base
        for prompt, ids in zip(cfg.validation_prompt, self.validation_ids[:-1], strict=True):
            kv = sample.prompt_keys_values(
                self.method,
                base.model,
                base.frozen,
                state.trainable,
                state.given,
                ids,
                self.validation_ids[-1],
                np.float32(1),
            )
            drawn = sample.draw_prompt(
                base.model,
                base.frozen,
                kv,
                seed=cfg.seed,
                count=cfg.num_validation_images,
                batch_size=cfg.num_validation_images,
                size=sample.picture_size(base.model, cfg.resolution, cfg.resolution),
                scheduler="dpmpp_2m",
                steps=25,
                guidance_scale=7.5,
            )
            grid = images.image_grid(list(drawn), len(drawn))
            name = f"step-{step:05d}-{slug(prompt)}.png"
            about = {"parameters": f"{prompt}, step {step}, seed {cfg.seed}"}
            images.save_png(self.output_dir / "validation" / name, grid, about)
            if self.log:
                self.log.image(f"validation/{slug(prompt)}", grid, step)

    def save_identity(self, state: IdentityState, path: Path) -> Path:
        """Writes the identity file of a state."""
        identity = checkpoint.Identity(
            method=self.method,
            trainable=state.trainable,
            given=state.given,
            placeholder=self.base.tokenizer.placeholders[0].token,
            base_model=self.base.name,
            revision=self.base.revision,
            seed=self.cfg.seed,
            steps=int(state.step),
        )
        checkpoint.write_identity(path, identity)
        return path

    def save_embeds(self, state: IdentityState, path: Path) -> None:
        """Writes the pseudo tokens alone, in the form that diffusers loads."""
        about = {
            "base_model": self.base.name,
            "revision": self.base.revision or "unknown",
            "profile": self.method.profile,
            "steps": str(int(state.step)),
            "seed": str(self.cfg.seed),
        }
        vectors = np.asarray(state.trainable["pseudo_tokens"])
        learned_embeds.write(path, self.base.tokenizer.placeholders[0].token, vectors, about)

    def save_webui(self, state: IdentityState, folder: Path) -> None:
        """Writes the pseudo tokens for AUTOMATIC1111 and ComfyUI, where the file is the trigger."""
        token = self.base.tokenizer.placeholders[0].token
        name = re.sub(r"[^a-z0-9]+", "-", token).strip("-") or "person"
        path = folder / f"{name}.safetensors"
        learned_embeds.write_webui(path, np.asarray(state.trainable["pseudo_tokens"]), {})

    def save_run(
        self,
        metrics: Metrics | None,
        steps: int,
        seconds: float,
        person: people.Person,
        folder: Path,
    ) -> None:
        """Writes the resolved config (`--config` reads it back) and what came of it."""
        with atomic_write(folder / "config.yaml") as temporary:
            # Without the way this run was resumed: the file says how to do all of it again.
            temporary.write_text(to_yaml(replace(self.cfg, resume_from_checkpoint=None)), "utf-8")
        if metrics is None and (self.output_dir / "run.json").is_file():
            return  # nothing was left to do: what the file says of the run is still true
        about = {
            "base_model": self.base.name,
            "revision": self.base.revision,
            "steps": steps,
            "last_loss": None if metrics is None else float(metrics.loss),
            "loss_curve": loss_curve(self.losses),
            "seconds": round(seconds, 1),
            "held_out": [picture.name for picture in person.held_out],
            "device": jax.devices()[0].device_kind,
            "versions": checkpoint.versions(),
        }
        sample.write_json(folder / "run.json", about)

    def close(self) -> None:
        """Flushes the log."""
        if self.log:
            self.log.close()


def loss_curve(losses: list[tuple[int, float]], points: int = 40) -> list[tuple[int, float]]:
    """Means of at most `points` equal parts of (step, loss), each with its last step."""
    parts = np.array_split(np.array(losses, np.float64).reshape(-1, 2), points)
    return [(int(p[-1, 0]), float(f"{p[:, 1].mean():.6g}")) for p in parts if len(p)]
