"""What a card is; filled as `idea_jax.config.reading` says."""

from dataclasses import dataclass, fields

from idea_jax.config.settings import (
    CHECKPOINT,
    ENHANCER,
    ConfigError,
    TrainConfig,
    check_compile_cache,
    check_sources,
    not_negative,
    positive,
    same_as,
    setting,
)
from idea_jax.enhancer.settings import CELEBRITIES, PrepareConfig
from idea_jax.evaluation.settings import EvaluateConfig

TRAIN, REST = "train", "rest"


@dataclass(frozen=True)
class CardConfig:
    """Everything that decides what `idea-evaluate --card` does."""

    card: str = setting(
        ...,
        "folder that receives everything; card/ in it can be passed on; the same command goes on",
    )
    pretrained_model_name_or_path: str = setting(..., CHECKPOINT)
    # The people
    people: str | None = setting(
        None, "folder with a folder per person: their true photos, two of each or more"
    )
    dataset: str | None = same_as(PrepareConfig, "dataset")
    dataset_dir: str | None = same_as(PrepareConfig, "dataset_dir")
    test_people: int = setting(
        20, "people who are learned, drawn and scored: the first of all who have enough photos"
    )
    photos_per_person: int = setting(
        1, "photos of each that are learned from; up to 8 others are held out"
    )
    # The shared ID-Enhancer
    enhancer: str = setting(
        "auto", f"{ENHANCER}, or train; auto trains one where the checkpoint has none"
    )
    enhancer_people: str | None = setting(
        None,
        f"whom it is trained on: {REST}, all people but the test people; or {CELEBRITIES}, as the "
        f"checkpoint draws them (default: {REST} of a data set, {CELEBRITIES} beside a folder)",
        choices=(REST, CELEBRITIES),
    )
    enhancer_config: str | None = setting(
        None, "YAML of its training (default: that of the checkpoint's family in idea_jax/configs)"
    )
    celebrity_pictures: int = setting(16, "pictures that are drawn of each celebrity for it")
    # The face models
    face_model_dir: str | None = same_as(EvaluateConfig, "face_model_dir")
    face_model: str | None = same_as(EvaluateConfig, "face_model")
    accept_face_licence: bool = same_as(EvaluateConfig, "accept_face_licence")
    score_model: str | None = same_as(EvaluateConfig, "score_model")
    score_crop: str = same_as(EvaluateConfig, "score_crop")
    same_recogniser: bool = same_as(EvaluateConfig, "same_recogniser")
    face_provider: str = same_as(EvaluateConfig, "face_provider")
    # The comparison
    compare: str | None = setting(
        None, "methods, as without --card (default: all profiles, with the enhancer and without)"
    )
    mode: str = same_as(EvaluateConfig, "mode")
    prompts: str | None = same_as(EvaluateConfig, "prompts")
    clip: str = same_as(EvaluateConfig, "clip")
    pictures: int | None = same_as(EvaluateConfig, "pictures")
    num_inference_steps: int | None = same_as(EvaluateConfig, "num_inference_steps")
    guidance_scale: float | None = same_as(EvaluateConfig, "guidance_scale")
    batch_size: int = same_as(EvaluateConfig, "batch_size")
    identities_per_step: int | None = same_as(EvaluateConfig, "identities_per_step")
    # The checkpoint and the machine
    revision: str | None = same_as(EvaluateConfig, "revision")
    variant: str | None = same_as(EvaluateConfig, "variant")
    tokenizer_name: str | None = same_as(EvaluateConfig, "tokenizer_name")
    prediction_type: str | None = same_as(EvaluateConfig, "prediction_type")
    original_config: str | None = same_as(EvaluateConfig, "original_config")
    mixed_precision: str = same_as(EvaluateConfig, "mixed_precision")
    attention: str = same_as(TrainConfig, "attention")
    compile_cache: str | None = same_as(TrainConfig, "compile_cache")
    seed: int | None = same_as(EvaluateConfig, "seed")
    # The result
    with_pictures: bool = setting(
        False, "card/ shows photos and pictures of the people; ask them before"
    )
    dry_run: bool = setting(False, "say what would be done and how long it takes; do nothing")

    def __post_init__(self):
        positive(self, "test_people", "photos_per_person", "pictures", "num_inference_steps")
        positive(self, "batch_size", "identities_per_step")
        not_negative(self, "guidance_scale")
        check_compile_cache(self.compile_cache)
        check_sources("--people", self.people, self.dataset, self.dataset_dir)
        if self.test_people < 2:
            raise ConfigError(
                f"test_people must be 2 or more, got {self.test_people}: the floor is what other "
                "people's photos score"
            )
        if self.celebrity_pictures < 2:
            raise ConfigError(
                f"celebrity_pictures must be 2 or more, got {self.celebrity_pictures}"
            )
        # What an evaluation refuses is refused before anything is done.
        self.evaluation(".", None, ".", self.compare or "paper", "none")

    @property
    def trains_on(self) -> str:
        """Whom the shared ID-Enhancer is trained on, if it is."""
        return self.enhancer_people or (REST if self.dataset else CELEBRITIES)

    def evaluation(
        self, photos: str, held_out: str | None, out: str, compare: str, enhancer: str
    ) -> EvaluateConfig:
        """The settings of the comparison."""
        own = {spec.name for spec in fields(EvaluateConfig)}
        shared = {name: getattr(self, name) for name in self.__dataclass_fields__ if name in own}
        given = {"photos": photos, "held_out": held_out, "output_dir": out}
        given |= {"compare": compare, "enhancer": enhancer}
        return EvaluateConfig(**shared | given)
