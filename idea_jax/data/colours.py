"""Colours of decoded pictures, as 8-bit sRGB: colour profiles, transparency, 16-bit grey."""

import functools
import io
import logging
from typing import Any

import numpy as np
from PIL import Image, ImageCms

log = logging.getLogger(__name__)

# Modes that a profile can speak of, by the colour space that it names.
_MODES_OF_PROFILES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


def to_rgb(image: Image.Image, name: Any) -> Image.Image:
    """A decoded picture as 8-bit RGB: sRGB, over white where it is transparent.

    A colour profile that cannot be used is reported with the picture's `name`, and left out.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling. The upper byte is
        # what Pillow takes of 16-bit colour.
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    alpha = None
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if profile:
        image = _to_srgb(image, profile, name)
    image = image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def _to_srgb(image: Image.Image, profile: bytes, name: Any) -> Image.Image:
    """A picture whose colours are those that its profile means, in sRGB."""
    try:
        convert, is_srgb = _conversion(profile)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError) as error:
        _say_once(
            f"the colour profile of {name} cannot be used ({error or type(error).__name__}); its "
            "colours are taken as sRGB"
        )
        return image
    if is_srgb:
        return image  # as it is stored, to the bit
    return ImageCms.applyTransform(image.convert(convert.input_mode), convert)


@functools.lru_cache(maxsize=64)  # a folder of photos has the profile of one or two phones
def _conversion(profile: bytes) -> tuple[ImageCms.ImageCmsTransform, bool]:
    """What converts a profile's colours to sRGB, and whether it leaves all as they are.

    Raises:
      PyCMSError, OSError, ValueError: it is no profile, or one of another kind of device.
    """
    opened = ImageCms.getOpenProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    if space not in _MODES_OF_PROFILES:
        raise ValueError(f"it is for {space}, expected {', '.join(_MODES_OF_PROFILES)}")
    mode = _MODES_OF_PROFILES[space]
    convert = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "RGB":
        return convert, False
    # The many profiles that call themselves sRGB differ from it by rounding.
    steps = np.arange(0, 256, 15, np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(len(steps), -1, 3)
    converted = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), convert))
    return convert, bool(np.abs(converted.astype(int) - colours).max() <= 1)


@functools.lru_cache(maxsize=1024)  # a picture is read more than once
def _say_once(notice: str) -> None:
    log.warning("%s", notice)
