"""The stages of a pretraining, how much is drawn, and how long each stage trains."""

from dataclasses import dataclass

# In the order in which they are begun: what others wait for longest, then what takes long.
STAGE_NAMES = tuple(
    "prepare drawings judge vae clip unet unet_names unet_again detector recogniser decoder "
    "scoring scoring_judge enhancer finish".split()
)


@dataclass(frozen=True)
class Budget:
    """How much is drawn, and how long each stage trains: steps and samples a step."""

    drawings: int
    people: int
    each: int
    captions: int
    vae: tuple[int, int]
    vae_details: tuple[int, int]
    decoder: tuple[int, int]
    recogniser: tuple[int, int]
    detector: tuple[int, int]
    judge: tuple[int, int]
    clip: tuple[int, int]
    unet: tuple[int, int]
    unet_names: tuple[int, int]
    unet_again: tuple[int, int]
    enhancer: tuple[int, int, int, int]
    enhancer_people: int
    enhancer_each: int
    vae_widths: tuple[int, ...]
    unet_widths: tuple[int, ...]
    unet_layers: int
    text_width: int
    face_widths: tuple[int, ...]
    detector_widths: tuple[int, ...]


BUDGETS = {
    "full": Budget(
        drawings=96_000,
        people=2200,
        each=10,
        captions=4,
        vae=(2000, 8),
        vae_details=(3700, 8),
        decoder=(2500, 8),
        recogniser=(1400, 64),
        detector=(6000, 16),
        judge=(3000, 32),
        clip=(2700, 96),
        unet=(9000, 96),
        unet_names=(4000, 96),
        unet_again=(8000, 96),
        enhancer=(1500, 64, 300, 32),
        enhancer_people=4800,
        enhancer_each=4,
        vae_widths=(16, 32, 96, 112),
        unet_widths=(64, 128),
        unet_layers=1,
        text_width=192,
        face_widths=(16, 32, 64, 128),
        detector_widths=(24, 32, 64, 96),
    ),
    # Minutes, to see that every stage learns.
    "tiny": Budget(
        drawings=256,
        people=32,
        each=4,
        captions=1,
        vae=(12, 4),
        vae_details=(8, 4),
        decoder=(24, 4),
        recogniser=(60, 16),
        detector=(12, 4),
        judge=(16, 16),
        clip=(12, 16),
        unet=(16, 8),
        unet_names=(8, 8),
        unet_again=(8, 8),
        enhancer=(4, 8, 2, 8),
        enhancer_people=8,
        enhancer_each=2,
        vae_widths=(8, 8, 16, 16),
        unet_widths=(16, 32),
        unet_layers=1,
        text_width=32,
        face_widths=(8, 8, 16, 16),
        detector_widths=(8, 8, 16, 16),
    ),
}
