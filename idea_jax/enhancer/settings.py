"""What preparing and training the shared enhancer are; filled as `idea_jax.config.reading` says."""

from dataclasses import dataclass

from idea_jax.config.settings import (
    ATTENTION,
    ATTENTIONS,
    CHECKPOINT,
    COMPILE_CACHE,
    COMPUTE_DTYPES,
    LORA,
    PREDICTION_TYPES,
    READING,
    REMAT,
    REMATS,
    ConfigError,
    check_compile_cache,
    check_finding,
    check_inside,
    check_seed,
    not_negative,
    positive,
    setting,
)

CELEBRITIES = "celebrities"
DATASETS = ("celeb_a",)
KINDS = ("mlp", "attention", "names", "linear")
STARTS = ("names", "cross_init", "ridge")


@dataclass(frozen=True)
class PrepareConfig:
    """Everything that decides what `--prepare` writes."""

    prepare: str = setting(
        ..., "folder that receives the prepared inputs; the same command goes on"
    )
    pretrained_model_name_or_path: str = setting(..., CHECKPOINT)
    revision: str | None = setting(None, "branch, tag or commit of a Hub checkpoint")
    variant: str | None = setting(None, "file variant of the weights, such as fp16")
    tokenizer_name: str | None = setting(None, READING["tokenizer_name"])
    prediction_type: str | None = setting(
        None, READING["prediction_type"], choices=PREDICTION_TYPES
    )
    original_config: str | None = setting(None, READING["original_config"])
    lora: list[str] | None = setting(None, LORA)
    # The people
    people: str | None = setting(
        None,
        "folder with a folder per person (captions.jsonl in it may hold texts of their pictures), "
        "or celebrities: the people of the names file, as the checkpoint draws them",
    )
    dataset: str | None = setting(None, "data set, instead of people", choices=DATASETS)
    dataset_dir: str | None = setting(
        None, "folder in which tensorflow-datasets prepared the data set, as array_record"
    )
    identities: str | None = setting(None, "which people, FROM:TO without TO (default: all)")
    n_pseudo_tokens: int = setting(2, "pseudo tokens that stand for a person")
    # Celebrities
    celeb_path: str | None = setting(
        None, "file of names, one per line (default: the checkpoint's own, or the shipped list)"
    )
    celebrity_pictures: int = setting(4, "pictures that are drawn of each name")
    celebrity_steps: int = setting(20, "sampling steps of each")
    celebrity_guidance: float = setting(5.0, "classifier-free guidance of each, more than 1")
    celebrity_likeness: float = setting(
        0.3, "least similarity of a picture to the mean of the others of its name, -1 to 1"
    )
    celebrity_prompt: list[str] | None = setting(
        None, "prompts with {} for the name (default: six plain ones)"
    )
    # The face
    face_model_dir: str | None = setting(
        None, "folder of an insightface pack: a detector and a recogniser"
    )
    face_model: str | None = setting(
        None, "ArcFace model, ONNX, 112x112 input; a detector is looked for beside it"
    )
    accept_face_licence: bool = setting(
        False,
        "let insightface download its models if there are none (non-commercial research only)",
    )
    face_select: str = setting(
        "largest",
        "which of several faces: largest, center, left, right, or a number from the left",
    )
    face_provider: str = setting("cpu", "where the face models run", choices=("cpu", "cuda"))
    pre_aligned: bool = setting(False, "the photos are aligned 112x112 face crops already")
    # Pictures
    resolution: int | None = setting(
        None, "side of the training image in pixels (default: what the checkpoint was trained on)"
    )
    crop: str = setting(
        "face",
        "what of a photo is trained on: a square around the face, the central square, or none",
        choices=("face", "center", "none"),
    )
    crop_margin: float = setting(1.0, "side of --crop face's square, in that of FFHQ's")
    shard_pictures: int = setting(
        1024, "pictures of a shard; what an interruption costs at most is one shard"
    )
    mixed_precision: str = setting(
        "no", "compute type of the frozen networks", choices=tuple(COMPUTE_DTYPES)
    )
    attention: str = setting("auto", ATTENTION, choices=ATTENTIONS)
    compile_cache: str | None = setting(None, COMPILE_CACHE)
    seed: int = setting(0, "seed of the drawings, and of the small and turned versions")

    def __post_init__(self):
        positive(self, "n_pseudo_tokens", "celebrity_steps", "resolution", "shard_pictures")
        check_seed(self.seed)
        check_compile_cache(self.compile_cache)
        check_finding(self)
        if (self.people is None) == (self.dataset is None):
            raise ConfigError("give exactly one of --people and --dataset (see --help)")
        if (self.dataset is None) != (self.dataset_dir is None):
            raise ConfigError("--dataset and --dataset_dir belong together: give both or none")
        defaults = type(self).__dataclass_fields__
        if self.people != CELEBRITIES:
            of_names = ["celeb_path", *(n for n in defaults if n.startswith("celebrity_"))]
            for name in of_names:
                if getattr(self, name) != defaults[name].default:
                    raise ConfigError(f"--{name} has no effect without --people {CELEBRITIES}")
        elif self.identities is not None or self.pre_aligned:
            raise ConfigError(
                f"--identities and --pre_aligned have no effect with --people {CELEBRITIES}"
            )
        if self.celebrity_pictures < 2:
            raise ConfigError(
                f"celebrity_pictures must be 2 or more, got {self.celebrity_pictures}: a picture "
                "is compared with the others of its name"
            )
        if not 1 < self.celebrity_guidance < 1000:
            raise ConfigError(
                f"celebrity_guidance must be more than 1, got {self.celebrity_guidance}"
            )
        if not -1 <= self.celebrity_likeness <= 1:
            raise ConfigError(
                f"celebrity_likeness must lie between -1 and 1, got {self.celebrity_likeness}"
            )
        if not 0.5 <= self.crop_margin <= 4:
            raise ConfigError(f"crop_margin must be from 0.5 to 4, got {self.crop_margin}")
        if self.crop_margin != 1 and self.crop != "face":
            raise ConfigError("--crop_margin has no effect without --crop face")
        if self.pre_aligned and self.crop == "face":
            raise ConfigError("--crop face has no effect on --pre_aligned photos: they are crops")


@dataclass(frozen=True)
class EnhancerTrainConfig:
    """Everything that decides what a training of the shared enhancer does."""

    pretrained_model_name_or_path: str = setting(..., CHECKPOINT, free=True)
    data: list[str] = setting(
        ..., "prepared folders, FOLDER or FOLDER=WEIGHT; --prepare makes them", free=True
    )
    output_dir: str = setting("enhancer-output", "folder that receives all results", free=True)
    revision: str | None = setting(None, "branch, tag or commit of a Hub checkpoint")
    variant: str | None = setting(None, "file variant of the weights, such as fp16", free=True)
    tokenizer_name: str | None = setting(None, READING["tokenizer_name"], free=True)
    prediction_type: str | None = setting(
        None, READING["prediction_type"], choices=PREDICTION_TYPES
    )
    original_config: str | None = setting(None, READING["original_config"], free=True)
    lora: list[str] | None = setting(None, LORA, free=True)
    # The enhancer
    kind: str = setting("mlp", "what leads from a face to a person's start", choices=KINDS)
    width: int = setting(512, "of its hidden layers")
    kv_rank: int = setting(4, "rank of the shared low-rank K/V delta")
    beta: float = setting(0.4, "scale of the ID-Adapter's contribution")
    start: str = setting(
        "cross_init",
        "what the tokens start from: the names' mean input embedding, Cross Initialization's "
        "output, or a ridge regression from faces to names (for which --data has celebrities)",
        choices=STARTS,
    )
    init_enhancer: str | None = setting(
        None,
        "enhancer.safetensors to go on from, instead of start; it decides kind, width, kv_rank and "
        "beta",
        free=True,
    )
    celeb_path: str | None = setting(
        None,
        "file of names, one per line (default: the checkpoint's own, or the shipped list)",
        free=True,
    )
    # Samples
    small_faces: float = setting(
        0.3, "how often the face is that of a small or turned version of the picture"
    )
    mean_faces: float = setting(0.2, "how often it is the mean of several pictures")
    random_flip: bool = setting(
        True, "mirror every other picture; not where left and right are told apart"
    )
    drop_adapter: float = setting(
        0.1, "how often adapter and K/V are off, so that tokens alone carry the person"
    )
    # The identity loss
    id_loss_weight: float = setting(
        0.0,
        "weight of 1 - likeness of people who are drawn in each step (0: nobody is drawn)",
        free=True,
    )
    id_loss_drawings: int = setting(
        16, "people who are drawn in a step, over all devices", free=True
    )
    id_loss_inference_steps: int = setting(8, "sampling steps of each drawing", free=True)
    # Optimisation
    max_train_steps: int = setting(1000, "steps; 0 writes what the training would start from")
    train_batch_size: int = setting(64, "samples per step, over all devices")
    gradient_accumulation_steps: int = setting(
        1, "parts in which a device takes its samples, one after the other: less memory"
    )
    learning_rate: float = setting(1e-3, "highest rate; a cosine leads from there to zero")
    warmup_steps: int = setting(100, "steps in which the rate grows to that")
    max_grad_norm: float = setting(1.0, "gradients of a greater norm are scaled down to it")
    adam_beta2: float = setting(0.99, "Adam beta2")
    adam_epsilon: float = setting(1e-8, "Adam epsilon")
    ema_decay: float = setting(0.999, "decay of the weights' moving average, the result")
    min_snr_gamma: float = setting(
        0.0, "timesteps with less noise than this signal-to-noise ratio weigh less (0: all alike)"
    )
    mixed_precision: str = setting(
        "no", "compute type of the frozen networks", choices=tuple(COMPUTE_DTYPES)
    )
    attention: str = setting("auto", ATTENTION, choices=ATTENTIONS, free=True)
    remat: str = setting("auto", REMAT, choices=REMATS, free=True)
    shard_frozen: bool = setting(
        False,
        "split the frozen weights over all devices, for devices with little memory",
        free=True,
    )
    distributed: bool = setting(
        False, "one of several processes: docs/scale.md says how they are started", free=True
    )
    compile_cache: str | None = setting(None, COMPILE_CACHE, free=True)
    seed: int = setting(0, "seed of everything random in the run")
    # Results on the way
    validation_steps: int = setting(
        250, "measure likeness at 0 steps every N steps (0: never)", free=True
    )
    validation_people: int = setting(
        16, "people who are held out for that, at most a quarter of all"
    )
    validation_prompt: str = setting("a photo of {}", "what is drawn of them", free=True)
    num_validation_images: int = setting(2, "pictures of each", free=True)
    validation_guidance: float = setting(
        5.0, "classifier-free guidance of these, and of the identity loss; more than 1", free=True
    )
    face_model_dir: str | None = setting(
        None, "folder of the pack that prepared the data", free=True
    )
    face_model: str | None = setting(None, "the recogniser that prepared the data", free=True)
    checkpointing_steps: int = setting(
        0, "write a checkpoint to resume from every N steps (0: none)", free=True
    )
    checkpoints_total_limit: int | None = setting(
        None, "keep only the newest N checkpoints", free=True
    )
    resume_from_checkpoint: str | None = setting(None, "'latest' or a checkpoint folder", free=True)
    save_dtype: str = setting(
        "float32",
        "type of the values in the result's file",
        choices=("float32", "float16", "bfloat16"),
        free=True,
    )
    report_to: str = setting(
        "tensorboard", "log of the losses", choices=("tensorboard", "none"), free=True
    )
    logging_dir: str = setting("logs", "folder of that log, inside output_dir", free=True)

    def __post_init__(self):
        positive(self, "width", "kv_rank", "train_batch_size", "gradient_accumulation_steps")
        positive(self, "learning_rate", "max_grad_norm", "adam_epsilon", "num_validation_images")
        positive(self, "checkpoints_total_limit", "validation_people")
        not_negative(self, "max_train_steps", "warmup_steps", "min_snr_gamma", "beta")
        not_negative(self, "validation_steps", "checkpointing_steps", "id_loss_weight")
        positive(self, "id_loss_drawings", "id_loss_inference_steps")
        check_seed(self.seed)
        check_compile_cache(self.compile_cache)
        check_inside("--logging_dir", self.logging_dir)
        defaults = type(self).__dataclass_fields__
        for name in ("id_loss_drawings", "id_loss_inference_steps"):
            if not self.id_loss_weight and getattr(self, name) != defaults[name].default:
                raise ConfigError(f"--{name} has no effect without --id_loss_weight")
        if self.id_loss_weight and self.shard_frozen:
            raise ConfigError(
                "--id_loss_weight draws people with whole weights: leave --shard_frozen out"
            )
        if self.init_enhancer is not None and self.start != defaults["start"].default:
            raise ConfigError("--start has no effect with --init_enhancer, which is the start")
        for name in ("small_faces", "mean_faces", "drop_adapter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.face_model is not None and self.face_model_dir is not None:
            raise ConfigError("give either --face_model or --face_model_dir, not both")
        if not 1 < self.validation_guidance < 1000:
            raise ConfigError(
                f"validation_guidance must be more than 1, got {self.validation_guidance}"
            )
        if self.train_batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"--train_batch_size {self.train_batch_size} is no multiple of "
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
