"""What a plan is of; filled as `idea_jax.config.reading` says."""

from dataclasses import dataclass

from idea_jax.config.settings import (
    COMPUTE_DTYPES,
    REMATS,
    ConfigError,
    not_negative,
    positive,
    read_mesh,
    setting,
)

KINDS = ("train", "enhancer", "sample")


@dataclass(frozen=True)
class PlanConfig:
    """Everything that decides what `idea-plan` says."""

    checkpoint: str = setting(
        ...,
        "folder, file or Hub id, of which only the configs are read; mini; or what was published: "
        "sd15, sd21 or sdxl",
    )
    what: str = setting("train", "the program that is looked at", choices=KINDS)
    device: str = setting(
        "v5e:2x4",
        "where it will run: v4, v5e, v5p or v6e with a topology, such as v5e:4x4; a100, h100 or "
        "h200, such as h100:8; or cpu",
    )
    people: int = setting(1, "people that are trained, or pictures that are drawn")
    pictures_per_person: int = setting(1, "photos of each person that there is room for")
    steps: int | None = setting(None, "steps of each (default: that of the program)")
    batch: int | None = setting(None, "samples or pictures of a step (default: as for steps)")
    mixed_precision: str = setting(
        "bf16", "compute type of the frozen networks", choices=tuple(COMPUTE_DTYPES)
    )
    attention: str = setting(
        "auto", "plain attention, or the device's kernel", choices=("auto", "xla")
    )
    remat: str = setting(
        "auto",
        "what the backward pass computes again, as of the training: the inside of the UNet's "
        "blocks, or nothing; auto is nothing where that fits",
        choices=REMATS,
    )
    kv: str = setting("low_rank", "K/V delta of a person", choices=("none", "low_rank", "full"))
    resolution: int | None = setting(None, "side of the pictures (default: the checkpoint's own)")
    mesh: str = setting("auto", "devices of training, such as identity=4,data=2, or auto")
    identities_per_step: int | None = setting(None, "people in one step, over all devices")
    shard_frozen: bool = setting(False, "split the frozen weights over the devices on data")
    utilisation: float = setting(0.4, "share of the device's peak that is reached; an assumption")
    price_per_hour: float | None = setting(None, "of one device, in whatever currency")
    no_compile: bool = setting(False, "compute alone, where libtpu could compile for a TPU")
    json: bool = setting(False, "print JSON instead of a table")

    def __post_init__(self):
        positive(self, "people", "pictures_per_person", "steps", "batch", "resolution")
        positive(self, "identities_per_step")
        not_negative(self, "price_per_hour")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"utilisation must lie in (0, 1], got {self.utilisation}")
        if self.mesh != "auto":
            read_mesh(self.mesh)
        if self.what != "train":
            for name in ("mesh", "identities_per_step", "kv", "pictures_per_person"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(f"--{name} has no effect with --what {self.what}")
        if self.what == "sample" and self.shard_frozen:
            raise ConfigError("--shard_frozen has no effect with --what sample")
        if self.what == "sample" and self.remat != "auto":
            raise ConfigError("--remat has no effect with --what sample")
        if self.what == "enhancer" and self.people != 1:
            raise ConfigError(
                "--people has no effect with --what enhancer: it is one for everybody"
            )
