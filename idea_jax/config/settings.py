"""What a run is: two frozen dataclasses of settings, with what each setting means and may be.

A field's name is its YAML key and its flag. Nothing else in the package holds a
default of a setting.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from idea_jax.errors import InputError


class ConfigError(InputError, ValueError):
    """A setting is unknown, of the wrong type, or does not fit the others."""


# What a setting may be marked with, and what it is without the mark.
MARKS: dict[str, Any] = {
    "profiles": (),  # those that have the part that it sets; a profile that would ignore it refuses
    "face": False,  # whether it says how a face is found; settled where faces are precomputed
    "free": False,  # whether it may differ between a run and its resumption: it touches no number
    "fast": None,  # what --preset fast sets
    "fast_times": None,  # what --preset fast multiplies it by, unless the number of steps is given
}


# What programs call alike things, each by its own name: as a flag each takes the others' as well.
SAME_THING = (
    ("output_dir", "save_dir", "out"),  # where results go
    ("num_images_per_prompt", "pictures"),
    ("pretrained_model_name_or_path", "checkpoint"),
)


def names_elsewhere(name: str) -> list[str]:
    """What other programs call a setting."""
    return [other for names in SAME_THING if name in names for other in names if other != name]


def setting(
    default: Any,
    text: str,
    *,
    aliases: Sequence[str] = (),
    choices: Sequence | None = None,
    switch: tuple | None = None,
    **marks: Any,
) -> Any:
    """A dataclass field with its help text, extra flag names, allowed values and `MARKS`.

    A default of `...` makes the setting required. `switch` is the name of an on-off flag that means
    the same setting, with the values that on and off stand for.
    """
    if unknown := marks.keys() - MARKS.keys():
        raise TypeError(f"unknown marks: {', '.join(unknown)}")
    metadata: dict[str, Any] = {
        "help": text,
        "aliases": tuple(aliases),
        "choices": choices,
        "switch": switch,
    }
    metadata |= MARKS | marks
    if default is ...:
        return field(metadata={**metadata, "required": True})
    return field(default=default, metadata=metadata)


def settings_of(cls: type) -> list[dataclasses.Field]:
    """The fields of a dataclass that are settings: its own before those of its bases."""
    specs = {spec.name: spec for spec in dataclasses.fields(cls) if spec.metadata}
    order = [name for base in cls.__mro__ for name in inspect.get_annotations(base)]
    return [specs[name] for name in dict.fromkeys(order) if name in specs]


def same_as(cls: type, name: str) -> Any:
    """A setting of another dataclass, with the same default and meaning."""
    (spec,) = (spec for spec in dataclasses.fields(cls) if spec.name == name)
    if "required" in spec.metadata:
        return field(metadata=spec.metadata)
    return field(default=spec.default, metadata=spec.metadata)


def held_on_resume(cfg: Any) -> dict[str, Any]:
    """The settings that a resumed run must share with the run that it goes on with."""
    held = (spec.name for spec in settings_of(type(cfg)) if not spec.metadata["free"])
    return {name: getattr(cfg, name) for name in held}


# Of both programs
ATTENTIONS = ("auto", "xla", "cudnn", "splash", "chunked")

ATTENTION = (
    "kernel of long self-attentions: cudnn on NVIDIA (Ampere or later) in bf16, splash on TPU, "
    "chunked on CPU, else xla; any device can take chunked, which never holds all weights at once"
)

REMATS = ("auto", "none", "blocks")
REMAT = (
    "what the backward pass computes again instead of keeping it: the inside of the UNet's "
    "blocks, which takes less memory and a third more time, or nothing; auto is blocks on SDXL"
)

COMPILE_CACHE = (
    "folder of compiled programs, or off (default: idea_jax/compiled in the user's cache)"
)


ENHANCER = (
    "file of a shared ID-Enhancer, auto (enhancer/enhancer.safetensors in the checkpoint's folder, "
    "if it is there) or none"
)

# Of every program that reads a checkpoint
CHECKPOINT = (
    "Stable Diffusion checkpoint: a folder in diffusers layout, a .safetensors file in the "
    "original layout, a Hub id, or mini (shipped)"
)

PREDICTION_TYPES = ("epsilon", "v_prediction")

READING = {
    "tokenizer_name": "another tokenizer than the checkpoint's, or, for one in a file, than CLIP's "
    "(shipped): a folder, or a Hub id",
    "prediction_type": "what the UNet predicts (default: what the checkpoint says)",
    "original_config": "original config (YAML) of a checkpoint in one file (default: as its shapes "
    "say)",
}

MOST_TOLD = 1_000_000  # pixels of a side that SDXL is told of; no photo has as many
VAE = "another autoencoder than the checkpoint's: a folder, or a Hub id"
CLIP_SKIP = (
    "layers left out at the end of the text encoder, as in diffusers (A1111's number less 1)"
)

LORA = "LoRA files, as FILE or FILE:SCALE, merged into the weights (may be repeated)"

FACE = {
    "face_model_dir": "folder of an insightface pack: a detector and a recogniser",
    "face_model": "ArcFace model, ONNX, 112x112 input; a detector is looked for beside it",
    "accept_face_licence": "let insightface download its models if there are none (non-commercial "
    "research only)",
    "face_embeddings": "faces that python -m idea_jax.faces has computed; no face model is needed "
    "then",
    "face_select": "which of several faces: largest, center, left, right, or a number from the "
    "left",
    "face_provider": "where the face models run (cpu leaves the GPU to JAX)",
    "pre_aligned": "the photos are aligned 112x112 face crops already",
    "drop_outliers": "leave out photos whose face is unlike the others' (otherwise only reported)",
}

FACE_PROVIDERS = ("cpu", "cuda")

# Of every program that draws
SCHEDULERS = ("ddim", "dpmpp_2m", "euler", "euler_ancestral", "lcm")
SPACINGS = ("leading", "trailing", "linspace")
SAMPLER = {
    "scheduler": "sampler (default: the checkpoint's own if it is one of these, else ddim)",
    "karras_sigmas": "of euler and dpmpp_2m: noise levels closer together where there is little "
    "noise (default: as the checkpoint says)",
    "timestep_spacing": "where the steps of all samplers but lcm lie; trailing for few-step "
    "checkpoints (default: as the checkpoint says)",
    "original_size": "of SDXL: height and width in pixels that it is told of a photo before it was "
    "scaled, such as 1024 1024; small ones give blurry pictures (default: the picture's own)",
    "crop_top_left": "of SDXL: top and left in pixels at which it is told that a photo was cut "
    "(default: 0 0, a whole one)",
    "guidance_rescale": "how much guidance keeps the contrast of the prompt alone, 0 to 1: 0.7 for "
    "checkpoints whose noise leaves no trace of the picture",
}
SECRETS = ("hub_token",)  # settings that no file keeps

PRESET = "; as a flag it wins over what --config says"
COMPUTE_DTYPES = {"no": "float32", "bf16": "bfloat16"}  # of the frozen networks, by precision


# What each profile of the method sets, where nothing more specific is given. The learning rates are
# those that the authors recommend (see docs/method.md); those of the paper profile's adapter,
# enhancer and K/V have no published value: these are first guesses, the same order of magnitude as
# LoRA rates in use, not yet tuned on data.
PROFILE_DEFAULTS: dict[str, dict] = {
    "paper": {
        "learning_rate": 1.5e-3,
        "adapter_learning_rate": 1e-4,
        "enhancer_learning_rate": 1e-4,
        "kv_learning_rate": 1e-4,
        "scale_lr": True,
        "reg_weight": 8e-4,
        "kv": "low_rank",
        "crop": "center",
    },
    "official": {
        "learning_rate": 1.5e-3,
        "adapter_learning_rate": 1.5e-3,
        "scale_lr": True,
        "reg_weight": 8e-4,
        "kv": "none",
        "crop": "none",
    },
    "cross_init": {
        "learning_rate": 6.25e-4,
        "scale_lr": True,
        "reg_weight": 1e-5,
        "kv": "none",
        "crop": "center",
    },
    "textual_inversion": {
        "learning_rate": 5e-4,
        "scale_lr": False,
        "reg_weight": 0.0,
        "kv": "none",
        "crop": "center",
    },
}


# What the paper profile sets instead where a shared ID-Enhancer says how a person begins. A setting
# of None is one of the person's own ID-Enhancer, which they then do not have.
ENHANCER_DEFAULTS: dict = {
    "max_train_steps": 25,
    "lr_scheduler": "cosine",
    "scale_lr": False,
    "learning_rate": 1e-2,
    "enhanced_learning_rate": 1e-3,
    "adapter_learning_rate": 3e-5,
    "enhancer_learning_rate": None,
    "kv_learning_rate": 1e-4,
    "train_parts": "tokens,enhanced,kv",
    "early_stopping": 0,
    "token_basis": "names",
}
# And where the tokens move along the directions of names, which is what holds them then.
BASIS_DEFAULTS: dict = {"learning_rate": 0.07, "regulariser": "none", "reg_weight": 0.0}

# What a preset means there.
ENHANCER_PRESETS: dict[str, dict] = {"fast": {"max_train_steps": 0}}

# The parts of a person that `train_parts` names, and the settings that only they read.
PARTS = {
    "tokens": (),
    "enhanced": (),
    "kv": ("kv", "kv_learning_rate"),
    "adapter": ("adapter_learning_rate",),
}

# Settings that nothing reads without a shared ID-Enhancer, and with one.
ENHANCER_ONLY = ("train_parts", "enhanced_learning_rate", "token_basis", "self_contained")

NOT_WITH_ENHANCER = ("enhancer_learning_rate", "initialize_tokens", "celeb_path")

# What happens between the first step and the last.
ON_THE_WAY = (
    "validation_prompt",
    "validation_prompt_file",
    "save_steps",
    "checkpointing_steps",
    "resume_from_checkpoint",
    "lr_warmup_steps",
)


FACE_PROFILES = ("paper", "official")  # those with a face embedding


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what `train_jax.py` does."""

    pretrained_model_name_or_path: str = setting(..., CHECKPOINT, free=True)
    train_data_dir: str | None = setting(
        None,
        "folder with one or more photos of one person, or with one such folder per person",
        free=True,
    )
    output_dir: str | None = setting(
        None,
        "folder that receives all results (default: idea- and the placeholder's name)",
        free=True,
    )
    overwrite: bool = setting(
        False, "replace another person in output_dir, once this one is done", free=True
    )
    preset: str | None = setting(
        None,
        "half the steps at twice the rates, and fewer for whom fewer are enough; with a shared "
        f"ID-Enhancer none at all{PRESET}",
        choices=("fast",),
        free=True,
    )
    profile: str = setting(
        "paper",
        "which method is trained: the paper's, the published code's, or a baseline",
        choices=tuple(PROFILE_DEFAULTS),
    )
    revision: str | None = setting(None, "branch, tag or commit of a Hub checkpoint")
    variant: str | None = setting(None, "file variant of the weights, such as fp16", free=True)
    tokenizer_name: str | None = setting(None, READING["tokenizer_name"], free=True)
    prediction_type: str | None = setting(
        None, READING["prediction_type"], choices=PREDICTION_TYPES
    )
    original_config: str | None = setting(None, READING["original_config"], free=True)
    lora: list[str] | None = setting(None, LORA, free=True)
    vae: str | None = setting(None, VAE)
    clip_skip: int = setting(0, CLIP_SKIP)
    # The person
    placeholder_token: str = setting("<person>", "the word that stands for the person")
    n_pseudo_tokens: int = setting(
        2, "pseudo tokens that are learned", aliases=("n_persudo_tokens", "num_vectors")
    )
    initialize_tokens: list[str] | None = setting(
        None, "words to start from instead of the names", aliases=("initializer_token",)
    )
    celeb_path: str | None = setting(
        None,
        "file of names, one per line, for Cross Initialization (default: the checkpoint's own "
        "names.txt, or the shipped list)",
        profiles=("paper", "official", "cross_init"),
        free=True,
    )
    # Several people
    dataset: str | None = setting(
        None,
        "data set to learn people from, instead of train_data_dir",
        choices=("celeb_a",),
        free=True,
    )
    dataset_dir: str | None = setting(
        None,
        "folder in which tensorflow-datasets prepared the data set, as array_record",
        free=True,
    )
    identities: str | None = setting(
        None, "which people of a data set or folder, FROM:TO without TO (default: all)", free=True
    )
    pictures_per_person: int | None = setting(
        None, "pictures of each person to train on, chosen by the seed; the rest is held out"
    )
    identities_per_step: int | None = setting(
        None,
        "people that are trained in one step, over all devices (default: one for each device on "
        "the mesh's identity axis)",
        free=True,
    )
    mesh: str | None = setting(
        None,
        "devices along people and along the samples of each, such as identity=4,data=2; auto: what "
        "is fastest and fits the memory, by idea-plan (default: all on identity for several "
        "people, else all on data)",
        free=True,
    )
    shard_frozen: bool = setting(
        False,
        "split the frozen weights over the mesh's data axis, for devices with little memory",
        free=True,
    )
    distributed: bool = setting(
        False, "one of several processes: docs/scale.md says how they are started", free=True
    )
    # The face (profiles paper and official, and --crop face)
    face_model_dir: str | None = setting(None, FACE["face_model_dir"], free=True, face=True)
    face_model: str | None = setting(None, FACE["face_model"], free=True, face=True)
    accept_face_licence: bool = setting(False, FACE["accept_face_licence"], free=True, face=True)
    face_embeddings: str | None = setting(None, FACE["face_embeddings"], free=True, face=True)
    face_select: str = setting("largest", FACE["face_select"], face=True)
    face_provider: str = setting(
        "cpu", FACE["face_provider"], choices=FACE_PROVIDERS, free=True, face=True
    )
    pre_aligned: bool = setting(False, FACE["pre_aligned"], face=True)
    drop_outliers: bool = setting(False, FACE["drop_outliers"], profiles=("paper", "official"))
    # A shared ID-Enhancer (profile paper)
    enhancer: str = setting("auto", ENHANCER, free=True)
    train_parts: str | None = setting(
        None,
        "with a shared ID-Enhancer, what is the person's own: tokens,enhanced, then kv and adapter "
        f"where wanted (default: {ENHANCER_DEFAULTS['train_parts']})",
        profiles=("paper",),
    )
    token_basis: str | None = setting(
        None,
        "with a shared ID-Enhancer, how the pseudo tokens move: in the space that the names span "
        "(the default where its file has one; learning_rate is then in the names' deviations), or "
        "none: freely",
        choices=("names", "none"),
        profiles=("paper",),
    )
    self_contained: bool = setting(
        False,
        "write identities that can be drawn without the file of the shared ID-Enhancer",
        profiles=("paper",),
    )
    # Pictures
    resolution: int | None = setting(
        None, "side of the training image in pixels (default: what the checkpoint was trained on)"
    )
    crop: str | None = setting(
        None,
        "what of a photo is trained on: a square around the face, the central square, or none: the "
        "whole, squeezed to a square (default: by profile)",
        choices=("face", "center", "none"),
        switch=("center_crop", "center", "none"),
    )
    crop_margin: float = setting(
        1.0,
        "side of --crop face's square, in that of FFHQ's: more than 1 for a model whose pictures "
        "show more around a face",
    )
    # Method
    regulariser: str | None = setting(
        None,
        "what ties the pseudo tokens to the anchor: the Mahalanobis distance with the exact "
        "inverse, or truncated as in the published code; the Euclidean distance; or none (default: "
        "by profile)",
        choices=("exact", "truncated", "euclidean", "none"),
    )
    reg_weight: float | None = setting(None, "weight of the regulariser (default: by profile)")
    beta: float = setting(
        0.4, "scale of the ID-Adapter's contribution", profiles=("paper", "official")
    )
    kv: str | None = setting(
        None,
        "how the UNet's cross-attention keys and values are trained (default: by profile)",
        choices=("low_rank", "full", "none"),
    )
    kv_rank: int = setting(4, "rank of the low-rank K/V delta", profiles=("paper",))
    # Optimisation
    max_train_steps: int = setting(
        320,
        f"steps; with a shared ID-Enhancer {ENHANCER_DEFAULTS['max_train_steps']} unless given, "
        "and 0 writes what it predicts",
        aliases=("max_train_step",),
        free=True,
        fast_times=0.5,
    )
    train_batch_size: int = setting(8, "samples per step")
    gradient_accumulation_steps: int = setting(
        1,
        "multiplies the samples per step: their mean gradient is that of so many batches, all in "
        "memory at once",
    )
    steps_per_call: int | None = setting(
        None,
        "steps in one call to the devices, during which nothing is looked at (default: 1 on a "
        "CPU, else 8)",
        free=True,
    )
    early_stopping: int = setting(
        0,
        "end a training after N evaluations without a gain of 1% on fixed noise (0: never)",
        fast=2,
    )
    evaluation_steps: int = setting(20, "steps from one such evaluation to the next")
    learning_rate: float | None = setting(
        None, "rate of the pseudo tokens (default: by profile)", fast_times=2
    )
    adapter_learning_rate: float | None = setting(
        None, "rate of the ID-Adapter", profiles=("paper", "official"), fast_times=2
    )
    enhancer_learning_rate: float | None = setting(
        None, "rate of the person's own ID-Enhancer", profiles=("paper",), fast_times=2
    )
    enhanced_learning_rate: float | None = setting(
        None, "rate of what a shared ID-Enhancer says of the face", profiles=("paper",)
    )
    kv_learning_rate: float | None = setting(
        None, "rate of the K/V delta", profiles=("paper",), fast_times=2
    )
    scale_lr: bool | None = setting(None, "multiply all rates by the batch size")
    lr_scheduler: str = setting(
        "constant",
        "how the rates go on: constant, or down to 0 at the last step as a cosine (the default "
        "with a shared ID-Enhancer) or in another way",
        choices=(
            "constant",
            "constant_with_warmup",
            "cosine",
            "cosine_with_restarts",
            "linear",
            "polynomial",
        ),
    )
    lr_warmup_steps: int = setting(0, "steps in which the rates rise to their full values")
    lr_num_cycles: int = setting(1, "how often the rates fall with cosine_with_restarts")
    adam_beta1: float = setting(0.9, "AdamW beta1")
    adam_beta2: float = setting(0.999, "AdamW beta2")
    adam_epsilon: float = setting(1e-7, "AdamW epsilon")
    adam_weight_decay: float = setting(1e-2, "AdamW weight decay, towards zero")
    mixed_precision: str = setting(
        "no", "compute type of the frozen networks", choices=tuple(COMPUTE_DTYPES)
    )
    attention: str = setting("auto", ATTENTION, choices=ATTENTIONS, free=True)
    remat: str = setting(
        "auto", f"{REMAT}, with --mesh auto where nothing fits without", choices=REMATS, free=True
    )
    compile_cache: str | None = setting(None, COMPILE_CACHE, free=True)
    seed: int = setting(0, "seed of everything random in the run")
    # Results on the way
    save_steps: int = setting(
        0, "save the identity every N steps under its step (0: at the end only)", free=True
    )
    only_save_embeds: bool = setting(
        False,
        "those saves on the way hold the token embeddings only, not the whole identity",
        free=True,
    )
    validation_prompt: list[str] | None = setting(
        None, "prompts with {} to draw on the way, as grids in output_dir/validation", free=True
    )
    validation_prompt_file: str | None = setting(
        None,
        "text file of such prompts, one per line; lines that begin with # are comments",
        free=True,
    )
    validation_steps: int = setting(100, "draw the validation prompts every N steps", free=True)
    num_validation_images: int = setting(4, "pictures per validation prompt", free=True)
    checkpointing_steps: int = setting(
        0, "write a checkpoint to resume from every N steps (0: none)", free=True
    )
    checkpoints_total_limit: int | None = setting(
        None, "keep only the newest N checkpoints", free=True
    )
    resume_from_checkpoint: str | None = setting(None, "'latest' or a checkpoint folder", free=True)
    report_to: str = setting(
        "tensorboard", "log of the losses", choices=("tensorboard", "none"), free=True
    )
    logging_dir: str = setting("logs", "folder of that log, inside output_dir", free=True)
    # The Hugging Face Hub
    push_to_hub: bool = setting(
        False,
        "upload the person to a private repository of yours, with a card, at the end",
        free=True,
    )
    hub_model_id: str | None = setting(
        None, "that repository, NAME or OWNER/NAME (default: the name of output_dir)", free=True
    )
    hub_token: str | None = setting(
        None, "token of the Hub (default: that of hf auth login); it is written nowhere", free=True
    )
    publish_consent: bool = setting(
        False,
        "the person on the photos agreed to being published, which --push_to_hub needs",
        free=True,
    )
    # No setting: names of those that neither a file nor a flag has given; see `resolve`.
    unsaid: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self):
        if self.output_dir is None:
            object.__setattr__(self, "output_dir", named_folder(self.placeholder_token))
        positive(self, "n_pseudo_tokens", "kv_rank", "train_batch_size")
        positive(self, "resolution", "validation_steps", "num_validation_images")
        positive(self, "identities_per_step", "steps_per_call", "evaluation_steps")
        positive(self, "checkpoints_total_limit", "adam_epsilon", "pictures_per_person")
        positive(self, "gradient_accumulation_steps", "lr_num_cycles")
        if self.lr_num_cycles > 1 and self.lr_scheduler != "cosine_with_restarts":
            raise ConfigError(
                f"--lr_num_cycles has no effect with --lr_scheduler {self.lr_scheduler}: it is of "
                "cosine_with_restarts"
            )
        # One setting from here on: how many samples a step has.
        samples = self.train_batch_size * self.gradient_accumulation_steps
        object.__setattr__(self, "train_batch_size", samples)
        object.__setattr__(self, "gradient_accumulation_steps", 1)
        if self.validation_prompt is not None and self.validation_prompt_file is not None:
            raise ConfigError("give either --validation_prompt or --validation_prompt_file")
        not_negative(self, "save_steps", "checkpointing_steps", "reg_weight", "adam_weight_decay")
        not_negative(self, "learning_rate", "adapter_learning_rate", "enhancer_learning_rate")
        not_negative(self, "kv_learning_rate", "beta", "early_stopping", "enhanced_learning_rate")
        not_negative(self, "max_train_steps", "lr_warmup_steps", "clip_skip")
        check_seed(self.seed)
        check_compile_cache(self.compile_cache)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        if self.kv not in (None, "none") and self.profile != "paper":
            raise ConfigError(
                f"kv={self.kv!r} has no effect with profile {self.profile!r}: only the paper "
                "profile trains keys and values; leave --kv out or take --profile paper"
            )
        if self.kv != "low_rank" and self.kv_rank != defaults["kv_rank"]:
            raise ConfigError(f"--kv_rank has no effect with --kv {self.kv}: it is of low_rank")
        own_rate = PROFILE_DEFAULTS[self.profile].get("kv_learning_rate")
        if self.kv == "none" and self.kv_learning_rate not in (None, own_rate):
            raise ConfigError("--kv_learning_rate has no effect with --kv none")
        if self.overwrite and self.resume_from_checkpoint is not None:
            raise ConfigError(
                "--overwrite begins anew, and --resume_from_checkpoint goes on: give one of them"
            )
        check_inside("--logging_dir", self.logging_dir)
        if not self.early_stopping and self.evaluation_steps != defaults["evaluation_steps"]:
            raise ConfigError("--evaluation_steps has no effect without --early_stopping")
        self.check_regulariser()
        if self.initialize_tokens is not None and self.celeb_path is not None:
            raise ConfigError("give either --initialize_tokens or --celeb_path, not both")
        for spec in settings_of(type(self)):
            profiles = spec.metadata["profiles"]
            if profiles and given(self, spec) and self.profile not in profiles:
                raise ConfigError(
                    f"--{spec.name} has no effect with profile {self.profile!r}; it belongs to "
                    f"{' and '.join(profiles)}"
                )

        self.check_enhancer()
        self.check_publishing()
        check_sources("--train_data_dir", self.train_data_dir, self.dataset, self.dataset_dir)
        self.check_face()
        shape = self.mesh_shape()
        is_split = self.mesh == "auto" or (shape is not None and shape["data"] > 1)
        if self.shard_frozen and not is_split:
            raise ConfigError(
                "--shard_frozen splits the weights over the devices on data; give --mesh with "
                "data=N, N > 1, or --mesh auto"
            )

    def check_enhancer(self) -> None:
        """Raises unless the settings fit a shared ID-Enhancer, or that there is none."""
        if self.profile != "paper" and self.enhancer not in ("auto", "none"):
            raise ConfigError(
                f"--enhancer has no effect with profile {self.profile!r}: only the paper profile "
                "begins with a shared ID-Enhancer; leave it out or take --profile paper"
            )
        if self.enhancer == "none" or self.profile != "paper":
            check_without_enhancer(self)
        if self.train_parts is not None:
            parts = self.train_parts.split(",")
            if not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
                raise ConfigError(
                    f"--train_parts names some of {', '.join(PARTS)}, each once and with commas "
                    f"between them, got {self.train_parts!r}"
                )
            if not {"tokens", "enhanced"} <= set(parts):
                raise ConfigError(
                    "--train_parts must name tokens and enhanced, which every person has of their "
                    f"own, got {self.train_parts!r}"
                )
        if self.max_train_steps == 0:
            for name in ON_THE_WAY:
                if getattr(self, name):
                    raise ConfigError(
                        f"--{name} has no effect with --max_train_steps 0, which takes no step "
                        "(--preset fast means that where there is a shared ID-Enhancer)"
                    )
        elif self.lr_warmup_steps >= self.max_train_steps:
            raise ConfigError(
                f"--lr_warmup_steps {self.lr_warmup_steps} must be less than --max_train_steps "
                f"{self.max_train_steps}"
            )

    def check_publishing(self) -> None:
        """Raises unless nobody is published, or somebody who agreed to it."""
        if not self.push_to_hub:
            for name in ("hub_model_id", "hub_token", "publish_consent"):
                if getattr(self, name):
                    raise ConfigError(f"--{name} has no effect without --push_to_hub")
        elif not self.publish_consent:
            raise ConfigError(
                "--push_to_hub publishes files that draw a person: give --publish_consent as well, "
                "if that person agreed to it"
            )

    def own_parts(self) -> tuple[str, ...]:
        """The names in `train_parts`; those of a person who begins with a shared ID-Enhancer."""
        return tuple((self.train_parts or "").split(","))

    def check_regulariser(self) -> None:
        """Raises unless regulariser and weight have an effect, or neither is wanted."""
        if self.reg_weight and self.regulariser == "none":
            raise ConfigError(
                f"--reg_weight {self.reg_weight:g} has no effect with --regulariser none; leave "
                "one of them out, or set the weight to 0"
            )
        if self.reg_weight and self.regulariser is None and self.profile == "textual_inversion":
            raise ConfigError(
                "profile 'textual_inversion' has no regulariser of its own, so --reg_weight "
                f"{self.reg_weight:g} has no effect; leave it out, or choose a --regulariser"
            )
        if self.regulariser not in (None, "none") and self.reg_weight == 0:
            raise ConfigError(
                f"--regulariser {self.regulariser} has no effect with a weight of 0; give a "
                "--reg_weight too, such as 8e-4 for truncated or 1e-5 for euclidean"
            )

    def check_face(self) -> None:
        """Raises unless the settings of the face fit together."""
        of_face = given_of_face(self)
        if of_face and self.profile not in FACE_PROFILES and self.crop != "face":
            raise ConfigError(
                f"--{of_face[0]} has no effect with profile {self.profile!r}; it belongs to "
                f"{' and '.join(FACE_PROFILES)}, and to --crop face"
            )
        check_precomputed(self)
        check_finding(self)
        if not 0.5 <= self.crop_margin <= 4:
            raise ConfigError(f"crop_margin must be from 0.5 to 4, got {self.crop_margin}")
        if self.crop_margin != 1 and self.crop != "face":
            raise ConfigError("--crop_margin has no effect without --crop face")
        if self.pre_aligned and self.crop == "face":
            raise ConfigError("--crop face has no effect on --pre_aligned photos: they are crops")

    def mesh_shape(self) -> dict[str, int] | None:
        """The sizes of the mesh's axes `identity` and `data`; None where none was given, or auto.

        Raises:
          ConfigError: the setting does not say that.
        """
        return None if self.mesh in (None, "auto") else read_mesh(self.mesh)

    @property
    def center_crop(self) -> bool:
        """Whether the central square of a photo is trained on."""
        return self.crop == "center"

    def rates(self) -> dict[str, float]:
        """Effective learning rate of each trained part, `scale_lr` included."""
        scale = self.train_batch_size if self.scale_lr else 1
        rates = {
            "pseudo_tokens": self.learning_rate,
            "adapter": self.adapter_learning_rate,
            "enhancer": self.enhancer_learning_rate,
            "enhanced": self.enhanced_learning_rate,
            "kv": self.kv_learning_rate,
        }
        return {part: rate * scale for part, rate in rates.items() if rate is not None}


@dataclass(frozen=True)
class SampleConfig:
    """Everything that decides what `sample_jax.py` does."""

    pretrained_model_name_or_path: str = setting(..., CHECKPOINT)
    identity: list[str] | None = setting(
        None,
        "identity.safetensors that training wrote; of several people one each, as FILE or as "
        "NAME=FILE (may be repeated)",
    )
    learned_embedding_path: str | None = setting(
        None, "token embeddings only: learned_embeds.safetensors or a legacy learned_embeds.bin"
    )
    photo: list[str] | None = setting(
        None,
        "photos of one person, who is drawn as a shared ID-Enhancer sees them, without training "
        "(may be repeated)",
    )
    enhancer: str = setting("auto", ENHANCER)
    token: str | None = setting(
        None, "which token of learned_embedding_path, where that holds several"
    )
    prompt: list[str] | None = setting(
        None,
        "prompts; {} stands for the person, and of several people for each in turn; {NAME} and "
        "{OTHER} put them into one picture",
    )
    prompt_file: str | None = setting(
        None, "text file with one prompt per line; lines that begin with # are comments"
    )
    save_dir: str = setting("samples", "folder that receives one folder per prompt")
    revision: str | None = setting(None, "branch, tag or commit of a Hub checkpoint")
    variant: str | None = setting(None, "file variant of the weights, such as fp16")
    tokenizer_name: str | None = setting(None, READING["tokenizer_name"])
    prediction_type: str | None = setting(
        None, READING["prediction_type"], choices=PREDICTION_TYPES
    )
    original_config: str | None = setting(None, READING["original_config"])
    lora: list[str] | None = setting(None, LORA)
    preset: str | None = setting(
        None, f"a better sampler with fewer steps, some unguided{PRESET}", choices=("fast",)
    )
    vae: str | None = setting(None, VAE)
    clip_skip: int = setting(0, CLIP_SKIP)
    negative_prompt: str = setting("", "what the pictures should not show")
    num_images_per_prompt: int = setting(4, "pictures per prompt and iteration")
    n_iter: int = setting(1, "iterations; picture numbers go on from one to the next")
    batch_size: int = setting(8, "pictures that are drawn in one call, on each device")
    num_inference_steps: int = setting(50, "sampling steps", fast=20)
    guidance_scale: float = setting(
        7.5, "classifier-free guidance; 1 or less turns it off, and halves the work"
    )
    guidance_interval: list[float] | None = setting(
        None,
        "guide only between these two parts of the way, 0 (clean) to 1 (noise): steps outside cost "
        "half (default: everywhere)",
        fast=(0.2, 0.9),
    )
    guidance_rescale: float = setting(0.0, SAMPLER["guidance_rescale"])
    scheduler: str | None = setting(None, SAMPLER["scheduler"], choices=SCHEDULERS, fast="dpmpp_2m")
    karras_sigmas: bool | None = setting(None, SAMPLER["karras_sigmas"])
    timestep_spacing: str | None = setting(None, SAMPLER["timestep_spacing"], choices=SPACINGS)
    eta: float = setting(0.0, "share of fresh noise in DDIM, 0 to 1")
    id_strength: float = setting(
        1.0, "scales the ID-Adapter's and the K/V delta's effect; 0 leaves the tokens alone"
    )
    # The face on --photo
    face_model_dir: str | None = setting(None, FACE["face_model_dir"], face=True)
    face_model: str | None = setting(None, FACE["face_model"], face=True)
    accept_face_licence: bool = setting(False, FACE["accept_face_licence"], face=True)
    face_embeddings: str | None = setting(None, FACE["face_embeddings"], face=True)
    face_select: str = setting("largest", FACE["face_select"], face=True)
    face_provider: str = setting("cpu", FACE["face_provider"], choices=FACE_PROVIDERS, face=True)
    pre_aligned: bool = setting(False, FACE["pre_aligned"], face=True)
    drop_outliers: bool = setting(False, FACE["drop_outliers"])
    # The pictures
    height: int | None = setting(None, "pixels (default: the checkpoint's own size)")
    width: int | None = setting(None, "pixels (default: the checkpoint's own size)")
    original_size: list[int] | None = setting(None, SAMPLER["original_size"])
    crop_top_left: list[int] | None = setting(None, SAMPLER["crop_top_left"])
    seed: int = setting(0, "picture i of a seed is the same whatever else is drawn")
    mixed_precision: str = setting(
        "no", "compute type of the frozen networks", choices=tuple(COMPUTE_DTYPES)
    )
    attention: str = setting("auto", ATTENTION, choices=ATTENTIONS)
    compile_cache: str | None = setting(None, COMPILE_CACHE)

    def __post_init__(self):
        positive(self, "num_images_per_prompt", "n_iter", "batch_size", "num_inference_steps")
        positive(self, "height", "width")
        not_negative(self, "guidance_scale", "id_strength", "eta", "clip_skip")
        check_seed(self.seed)
        check_compile_cache(self.compile_cache)
        sources = [self.identity, self.learned_embedding_path, self.photo]
        if sum(source is not None for source in sources) != 1:
            raise ConfigError(
                "give exactly one of --identity, --learned_embedding_path and --photo"
            )
        if self.token is not None and self.learned_embedding_path is None:
            raise ConfigError("--token chooses from --learned_embedding_path, which is not given")
        self.check_face()
        if (self.prompt is None) == (self.prompt_file is None):
            raise ConfigError("give exactly one of --prompt and --prompt_file")
        check_drawing(self)
        for name in ("guidance_interval", "guidance_rescale", "negative_prompt"):
            if getattr(self, name) and not is_guided(self.guidance_scale):
                scale = f"--guidance_scale {self.guidance_scale:g}"
                raise ConfigError(f"--{name} has no effect with {scale}")
        if "{" in self.negative_prompt or "}" in self.negative_prompt:
            raise ConfigError(
                "--negative_prompt says what pictures turn away from, and names nobody; {} can "
                "stand in --prompt only"
            )

    def check_face(self) -> None:
        """Raises unless the settings of the face fit --photo, and each other."""
        of_face = given_of_face(self) + ["drop_outliers"] * self.drop_outliers
        if of_face and self.photo is None:
            raise ConfigError(f"--{of_face[0]} has no effect without --photo")
        check_precomputed(self)
        check_finding(self)
        if self.photo is not None and self.enhancer == "none":
            raise ConfigError("--photo needs a shared ID-Enhancer; leave out --enhancer none")


def check_without_enhancer(cfg: TrainConfig) -> None:
    """Raises if a setting is given that only means something with a shared ID-Enhancer."""
    why = (
        f"profile {cfg.profile!r} has none"
        if cfg.profile != "paper"
        else "give --enhancer FILE, or a checkpoint that has one"
    )
    for name in ENHANCER_ONLY:
        if getattr(cfg, name):
            raise ConfigError(f"--{name} has no effect without a shared ID-Enhancer: {why}")
    if cfg.max_train_steps == 0:
        raise ConfigError(
            "--max_train_steps 0 writes what a shared ID-Enhancer predicts of a person, and there "
            f"is none: {why}, or take at least one step"
        )


def reading(cfg: Any) -> dict[str, Any]:
    """What a run says of how its checkpoint is to be read, as `sd.read_configs` takes it."""
    return {"prediction_type": cfg.prediction_type, "original_config": cfg.original_config}


def given(cfg: Any, spec: dataclasses.Field) -> bool:
    """Whether a setting is another one than by default."""
    return getattr(cfg, spec.name) != spec.default


def given_of_face(cfg: Any) -> list[str]:
    """The settings of how a face is found that are others than by default."""
    specs = settings_of(type(cfg))
    return [spec.name for spec in specs if spec.metadata["face"] and given(cfg, spec)]


def check_precomputed(settings: TrainConfig | SampleConfig) -> None:
    """Raises if faces are precomputed, and something is said of how they are to be found."""
    if settings.face_embeddings is None:
        return
    for name in given_of_face(settings):
        if name != "face_embeddings":
            raise ConfigError(
                f"--{name} has no effect with --face_embeddings: how faces are found was "
                "settled when that file was written"
            )


def named_folder(placeholder: str) -> str:
    """The folder for a person's results where none is named: two people hardly share one."""
    # Letters of every script; at most 40, since a file system counts bytes, up to four for each.
    name = re.sub(r"[^\w-]+", "-", placeholder.lower()).strip("-")[:40]
    return f"idea-{name or 'person'}"


def check_sources(name: str, folder: Any, dataset: str | None, dataset_dir: Any) -> None:
    """Raises unless there is one source of photos: a folder, whose setting has `name`, or a set."""
    if folder is None and dataset is None:
        raise ConfigError(f"missing: {name}, or --dataset with --dataset_dir (see --help)")
    if folder is not None and dataset is not None:
        raise ConfigError(f"give either {name} or --dataset, not both")
    if (dataset is None) != (dataset_dir is None):
        raise ConfigError("--dataset and --dataset_dir belong together: give both or none")


def check_finding(settings: Any) -> None:
    """Raises unless the settings of how a face is found fit together."""
    if settings.face_model is not None and settings.face_model_dir is not None:
        raise ConfigError("give either --face_model or --face_model_dir, not both")
    if settings.pre_aligned and settings.face_select != "largest":
        raise ConfigError(
            "--face_select has no effect on --pre_aligned photos: they are crops of one face"
        )


def read_mesh(value: str) -> dict[str, int]:
    """The sizes of the axes `identity` and `data` that a mesh in words has.

    Raises:
      ConfigError: it does not say that.
    """
    pairs = re.findall(r"(identity|data)=([1-9]\d*)(?:,|$)", value)
    shape = {axis: int(size) for axis, size in pairs}
    if ",".join("=".join(pair) for pair in pairs) != value or len(shape) < len(pairs):
        raise ConfigError(
            f"--mesh must be identity=N,data=M, such as identity=4,data=2, or auto, got {value!r}"
        )
    return {"identity": 1, "data": 1} | shape


def positive(config: Any, *names: str) -> None:
    """Raises unless each named field is None or greater than zero, and finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be greater than 0, got {value}")
        if value == math.inf:
            raise ConfigError(f"{name} must be finite, got {value}")


def not_negative(config: Any, *names: str) -> None:
    """Raises unless each named field is None or at least zero, and finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise ConfigError(f"{name} must not be negative, got {value}")
        if value == math.inf:
            raise ConfigError(f"{name} must be finite, got {value}")


def is_guided(guidance_scale: float) -> bool:
    """Whether there is guidance; otherwise the prompt alone is drawn, as in diffusers."""
    return guidance_scale > 1


def check_drawing(cfg: Any) -> None:
    """Raises unless the settings of guidance, of eta and of sizes lie in their ranges."""
    check_interval(cfg.guidance_interval)
    for name, least in (("original_size", 1), ("crop_top_left", 0)):
        pair = getattr(cfg, name)
        if pair is not None and (
            len(pair) != 2 or not least <= min(pair) <= max(pair) <= MOST_TOLD
        ):
            raise ConfigError(
                f"{name} must be two numbers of pixels from {least} to {MOST_TOLD}, got "
                f"{' '.join(map(str, pair))}"
            )
    for name in ("eta", "guidance_rescale"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(cfg, name)}")


def check_interval(interval: Sequence[float] | None) -> None:
    """Raises unless an interval of guidance is none, or two numbers from 0 to 1."""
    if interval is not None and (len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1):
        raise ConfigError(
            "guidance_interval must be two numbers from 0 to 1, the lower one first, got "
            f"{' '.join(map(str, interval))}"
        )


def check_seed(seed: int) -> None:
    """Raises unless a seed fits the 32 bits that random keys are made from."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed must lie between 0 and {2**32 - 1}, got {seed}")


def check_inside(name: str, folder: str) -> None:
    """Raises unless a folder lies inside output_dir."""
    if ".." in Path(folder).parts or Path(folder).is_absolute():
        raise ConfigError(f"{name} is a folder inside output_dir, got {folder!r}")


def check_compile_cache(folder: str | None) -> None:
    """Raises if a folder of compiled programs has no name, or one that was hardly meant as such."""
    if folder is None or folder == "off":
        return
    if folder.strip().lower() in ("", "off"):
        raise ConfigError(
            f"compile_cache must be a folder, or off, got {folder!r} (a folder of that name: ./OFF)"
        )
