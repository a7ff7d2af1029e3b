"""What a batch of many pictures is; filled as `idea_jax.config.reading` says."""

from dataclasses import dataclass
from typing import ClassVar

from idea_jax.config.settings import (
    ConfigError,
    SampleConfig,
    check_compile_cache,
    check_drawing,
    check_seed,
    not_negative,
    positive,
    same_as,
    setting,
)

JOB_FILES = (".jsonl", ".csv")  # how their names end
FORMATS = ("folder", "tar", "parquet")
PICTURES = ("png", "webp", "jpeg")


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """What programs share that draw rows, each of people, a prompt and settings of its own.

    What a row does not say, it takes from the setting of the same name.
    """

    SMALLER: ClassVar[str] = (
        "a smaller --batch_size, --mixed_precision bf16, or a smaller --height and --width"
    )

    # The model
    enhancer: str = same_as(SampleConfig, "enhancer")
    revision: str | None = same_as(SampleConfig, "revision")
    variant: str | None = same_as(SampleConfig, "variant")
    preset: str | None = same_as(SampleConfig, "preset")
    tokenizer_name: str | None = same_as(SampleConfig, "tokenizer_name")
    prediction_type: str | None = same_as(SampleConfig, "prediction_type")
    original_config: str | None = same_as(SampleConfig, "original_config")
    vae: str | None = same_as(SampleConfig, "vae")
    lora: list[str] | None = same_as(SampleConfig, "lora")
    clip_skip: int = same_as(SampleConfig, "clip_skip")
    mixed_precision: str = same_as(SampleConfig, "mixed_precision")
    attention: str = same_as(SampleConfig, "attention")
    compile_cache: str | None = same_as(SampleConfig, "compile_cache")
    # What a row may say itself
    negative_prompt: str = same_as(SampleConfig, "negative_prompt")
    num_inference_steps: int = same_as(SampleConfig, "num_inference_steps")
    guidance_scale: float = same_as(SampleConfig, "guidance_scale")
    guidance_interval: list[float] | None = same_as(SampleConfig, "guidance_interval")
    guidance_rescale: float = same_as(SampleConfig, "guidance_rescale")
    scheduler: str | None = same_as(SampleConfig, "scheduler")
    karras_sigmas: bool | None = same_as(SampleConfig, "karras_sigmas")
    timestep_spacing: str | None = same_as(SampleConfig, "timestep_spacing")
    eta: float = same_as(SampleConfig, "eta")
    id_strength: float = same_as(SampleConfig, "id_strength")
    height: int | None = same_as(SampleConfig, "height")
    width: int | None = same_as(SampleConfig, "width")
    original_size: list[int] | None = same_as(SampleConfig, "original_size")
    crop_top_left: list[int] | None = same_as(SampleConfig, "crop_top_left")
    seed: int = same_as(SampleConfig, "seed")

    def check_rows(self) -> None:
        """Raises ConfigError unless these settings lie in their ranges."""
        positive(self, "num_inference_steps", "height", "width")
        not_negative(self, "guidance_scale", "id_strength", "clip_skip")
        check_seed(self.seed)
        check_compile_cache(self.compile_cache)
        check_drawing(self)


@dataclass(frozen=True, kw_only=True)
class BatchConfig(RowsConfig):
    """Everything that decides what `idea-batch` does."""

    pretrained_model_name_or_path: str = same_as(SampleConfig, "pretrained_model_name_or_path")
    out: str = setting(..., "folder that receives the pictures and their index")
    jobs: str | None = setting(
        None, "file of rows, .jsonl or .csv: one picture each (also without the flag's name)"
    )
    prompts: str | None = setting(
        None, "instead of jobs: text file with one prompt per line, drawn of all --identities"
    )
    identities: str | None = setting(
        None, "folder of people, as training writes them: a row may name one of them"
    )
    num_images_per_prompt: int = setting(1, "with --prompts: pictures of each prompt and person")
    # Where it goes
    format: str = setting(
        "folder", "pictures as files, as WebDataset tar shards, or as Parquet", choices=FORMATS
    )
    shard_pictures: int = setting(1000, "pictures of a tar or Parquet file")
    picture: str = setting("png", "format of each picture", choices=PICTURES)
    quality: int = setting(95, "of webp and jpeg, 1 to 100")
    resume: bool = setting(
        False, "go on in a folder that has pictures; those whose rows are the same are kept"
    )
    dry_run: bool = setting(
        False, "say what would be drawn, how much space and time it takes; write nothing"
    )
    threads: int = setting(4, "that encode and write pictures")
    distributed: bool = setting(
        False, "one of several processes, each with a range of the rows: docs/scale.md"
    )
    batch_size: int = same_as(SampleConfig, "batch_size")

    def __post_init__(self):
        self.check_rows()
        positive(self, "num_images_per_prompt", "shard_pictures", "threads", "batch_size")
        if (self.jobs is None) == (self.prompts is None):
            raise ConfigError("give either a job file (--jobs) or --prompts, one of the two")
        if self.prompts is not None and self.identities is None:
            raise ConfigError("--prompts needs --identities, the folder of people to draw")
        if self.num_images_per_prompt != 1 and self.prompts is None:
            raise ConfigError(
                "--num_images_per_prompt has no effect on a job file, whose rows are a picture "
                "each: give them other numbers"
            )
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality must lie between 1 and 100, got {self.quality}")
        if self.quality != 95 and self.picture == "png":
            raise ConfigError("--quality has no effect on png, which loses nothing")
