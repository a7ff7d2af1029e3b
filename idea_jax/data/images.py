"""Pictures from disk to training pixels, and generated pixels to marked PNG files."""

import hashlib
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageOps,
    PngImagePlugin,
    UnidentifiedImageError,
    features,
)

from idea_jax.data.colours import to_rgb
from idea_jax.errors import InputError
from idea_jax.runtime.files import atomic_write, file_digest

log = logging.getLogger(__name__)

# Decoders of rarer formats are where Pillow's security holes have been; these suffice for photos.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")

# Brands that a phone's HEIC begins with, behind "ftyp"; its decoder is a package of its own.
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# Checked on the header, before any pixel is decoded. Above 8000x8000 and the 50-megapixel phones,
# and below the 89 megapixels from which Pillow itself warns.
MAX_PIXELS = 80_000_000
MIN_SIDE = 16

# The IPTC code for pictures made by a trained model, in the XMP property that search engines and
# picture agencies read: https://cv.iptc.org/newscodes/digitalsourcetype/ (PNG keyword: XMP part 3).
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_XMP_KEYWORD = "XML:com.adobe.xmp"

_XMP_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about=""'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    f"<Iptc4xmpExt:DigitalSourceType>{DIGITAL_SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="w"?>'
)

_MARKER = "AIGenerated"
MARKED = 65_536  # bytes at the beginning of a file by which `PictureFile.mark` tells pictures apart


class ImageError(InputError, ValueError):
    """A picture or folder of pictures that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class PictureFile:
    """A picture on disk, read whenever it is needed: a folder of photos would fill the memory.

    Pictures from elsewhere (`data.people`) have the same attributes and methods. As text it is the
    path, for messages.
    """

    path: Path

    @property
    def name(self) -> str:
        """The file's name, without folders."""
        return self.path.name

    def read(self) -> Image.Image:
        """The picture; see `read_image`."""
        return read_image(self.path)

    def sha256(self) -> str:
        """Hex digest of the file's bytes."""
        return file_digest(self.path)

    def mark(self) -> str:
        """What tells the picture from others at little cost: a digest of its size and beginning.

        Raises:
          OSError: the file cannot be read.
        """
        with open(self.path, "rb") as file:
            start, size = file.read(MARKED), os.fstat(file.fileno()).st_size
        return hashlib.blake2b(start + str(size).encode(), digest_size=16).hexdigest()

    def __str__(self) -> str:
        return str(self.path)


def readable(pictures: Sequence[PictureFile]) -> list[PictureFile]:
    """Returns the pictures that can be read; the others are reported.

    Raises:
      ImageError: none can; what is wrong with the first.
    """
    good, errors = [], []
    for picture in pictures:
        try:
            picture.read()
            good.append(picture)
        except ImageError as error:
            errors.append(error)
    if not good:
        raise errors[0]
    for reason in errors:
        log.warning("left out: %s", reason)
    return good


def without_copies(pictures: Sequence[PictureFile]) -> list[PictureFile]:
    """Returns the pictures without those whose bytes are those of an earlier one.

    A copy would count twice in every mean, and could lie on both sides of a split.
    """
    first: dict[str, PictureFile] = {}
    for picture in pictures:
        digest = picture.sha256()
        if digest in first:
            log.warning("skipped %s: a copy of %s", picture.name, first[digest].name)
        else:
            first[digest] = picture
    return list(first.values())


def read_image(path: str | Path) -> Image.Image:
    """Returns the picture as fully decoded 8-bit RGB, upright.

    EXIF orientation is applied, colours of another profile become sRGB, transparency is laid over
    white, CMYK and 16-bit pictures are converted, and of an animated picture the first frame is
    taken.

    Raises:
      ImageError: the file is missing, cut off, damaged, no JPEG/PNG/WebP/AVIF/HEIC, larger than
        `MAX_PIXELS` or smaller than `MIN_SIDE` on a side; or what decodes it is not installed.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return decode_image(file, path)
    except FileNotFoundError:
        raise ImageError(f"the picture {path} does not exist") from None
    except PermissionError:
        raise ImageError(f"no permission to read the picture {path}") from None
    except OSError as error:
        raise ImageError(f"the picture {path} cannot be read: {error.strerror}") from error


def decode_image(file: BinaryIO, name: Any, most_pixels: int | None = None) -> Image.Image:
    """`read_image` of an open file, or of bytes as a file.

    Args:
      name: of the picture, for messages.
      most_pixels: that it may have; default: `MAX_PIXELS`.

    Raises:
      ImageError: as `read_image`.
    """
    head = file.read(512)
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_formats_of(head, name)) as image:
                _check_size(name, image.size, most_pixels or MAX_PIXELS)
                image.load()
                return to_rgb(ImageOps.exif_transpose(image), name)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name} is too large to be decoded safely ({error}); scale it down"
        ) from error
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not a JPEG, PNG, WebP, AVIF or HEIC picture: {_sniff(head)}; convert or "
            "remove it"
        ) from None
    except (ImageError, PermissionError):
        raise
    except Exception as error:
        # On damaged files Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error,
        # zlib.error and more, without a common base; nothing but Pillow runs in the block above.
        raise ImageError(
            f"{name} is cut off or damaged ({error}); export or download it again"
        ) from error


def _formats_of(head: bytes, name: Any) -> tuple[str, ...]:
    """The formats that a file may have, by Pillow's names; told by its beginning.

    Raises:
      ImageError: what decodes it is not installed.
    """
    if head[4:8] != b"ftyp":
        return FORMATS
    if b"avif" in head[:64]:
        if not features.check("avif"):
            raise ImageError(f"{name} is an AVIF, which this build of Pillow cannot read")
        return FORMATS
    if head[8:12] not in _HEIC_BRANDS:
        return FORMATS
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError(
            f"{name} is a HEIC picture, which cannot be read here; convert it to JPEG",
            advice=", or pip install pillow-heif, which reads it",
        ) from error
    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def _check_size(name: Any, size: tuple[int, int], most_pixels: int) -> None:
    width, height = size
    if width * height > most_pixels:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than the limit of "
            f"{most_pixels // 1_000_000} megapixels; scale it down"
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{name} has {width} x {height} pixels; expected at least {MIN_SIDE} on each side"
        )


def _sniff(head: bytes) -> str:
    """Says in words what a file that Pillow did not recognise seems to be."""
    if not head:
        return "it is empty"
    if head[4:8] == b"ftyp":
        brand = head[8:12].decode("latin-1")
        kind = "an AVIF or HEIC picture" if brand[:3] in ("hei", "mif", "avi") else "a video"
        return f"it seems to be {kind}"
    magics = {
        b"\xff\xd8": "a damaged JPEG",
        b"\x89PNG": "a damaged PNG",
        b"RIFF": "a damaged WebP, a sound or a video",
        b"GIF8": "a GIF",
        b"II*\0": "a TIFF or camera raw file",
        b"MM\0*": "a TIFF or camera raw file",
        b"BM": "a BMP",
        b"%PDF": "a PDF",
        b"PK": "a zip archive",
    }
    for magic, name in magics.items():
        if head.startswith(magic):
            return f"it seems to be {name}"
    text = head.decode("utf-8", "ignore")
    if len(text) >= len(head) // 2 and all(c.isprintable() or c in "\t\r\n" for c in text):
        return "it seems to be a text file"
    return "its content is of no known picture format"


def central_square(size: tuple[int, int]) -> tuple[int, int, int]:
    """Returns left, top and side of the largest square in the middle of a picture of (w, h)."""
    width, height = size
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def crop_square(image: Image.Image, square: tuple[int, int, int]) -> Image.Image:
    """Returns the square (left, top, side) of a picture."""
    left, top, side = square
    return image.crop((left, top, left + side, top + side))


def crop_turned(
    image: Image.Image, centre: tuple[float, float], side: int, angle: float
) -> Image.Image:
    """Returns a turned square of a picture, upright: [side, side] pixels.

    Args:
      centre: in pixels from the upper left corner.
      angle: of its upper edge in the picture, radians, clockwise.
    """
    cos, sin = math.cos(angle), math.sin(angle)
    x = centre[0] - side / 2 * (cos - sin)
    y = centre[1] - side / 2 * (cos + sin)
    return image.transform(
        (side, side),
        Image.Transform.AFFINE,
        (cos, -sin, x, sin, cos, y),
        Image.Resampling.BICUBIC,
    )


def to_pixels(image: Image.Image, size: int, *, center_crop: bool) -> np.ndarray:
    """Returns float32[size, size, 3] in [-1, 1], ready for the VAE.

    With `center_crop` the central square is resized, otherwise the whole picture is squeezed to a
    square, as in the published code of ID-EA and textual inversion (bicubic, 8-bit, then
    `value / 127.5 - 1` in float64, rounded once).

    Raises:
      ImageError: `image` is not 8-bit RGB.
    """
    if image.mode != "RGB":
        raise ImageError(f"expected an RGB picture, got mode {image.mode}; use read_image")
    if center_crop:
        image = crop_square(image, central_square(image.size))
    image = image.resize((size, size), resample=Image.Resampling.BICUBIC)
    return (np.asarray(image) / 127.5 - 1.0).astype(np.float32)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Returns uint8 values for floats in [-1, 1] of any shape; values beyond are clipped.

    Inverse of the scaling in `to_pixels` for each of the 256 values.

    Raises:
      ImageError: some value is not finite.
    """
    images = np.asarray(images, np.float32)
    if not np.isfinite(images).all():
        raise ImageError(f"the pixels of {images.shape} are not all finite; nothing to save")
    return np.round((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def image_grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Returns uint8[rows*H, columns*W, 3]: equal pictures uint8[H, W, 3] row by row, rest white.

    Fewer pictures than `columns` make a single, shorter row.
    """
    if not images or columns < 1:
        raise ValueError(f"expected pictures and columns >= 1, got {len(images)} and {columns}")
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(f"expected pictures of one shape in a grid, got {sorted(shapes)}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width, channels = images[0].shape
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[: len(images)] = images
    cells = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return cells.reshape(rows * height, columns * width, channels)


def save_png(path: str | Path, pixels: np.ndarray, text: Mapping[str, str]) -> None:
    """Writes what `encode_png` returns; an earlier file stays until the new one is complete."""
    data = encode_png(pixels, text)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def encode_png(pixels: np.ndarray, text: Mapping[str, str]) -> bytes:
    """Returns uint8[H, W, 3] as a PNG that carries `text` and says that a model made the picture.

    The mark is the IPTC digital source type in XMP and a plain field `AIGenerated: true`.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected uint8[H, W, 3], got {pixels.dtype}{list(pixels.shape)}")
    fields = PngImagePlugin.PngInfo()
    for key, value in text.items():
        if key in (_MARKER, _XMP_KEYWORD):
            raise ValueError(f"the PNG field {key} is reserved for the mark of generated pictures")
        # Lone surrogates (undecodable bytes of a command line) have no UTF-8 form.
        fields.add_text(key, value.encode("utf-8", "replace").decode("utf-8"))
    fields.add_text(_MARKER, "true")
    fields.add_itxt(_XMP_KEYWORD, _XMP_PACKET)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=fields)
    return buffer.getvalue()


def encode_picture(
    pixels: np.ndarray, kind: str, text: Mapping[str, str], quality: int = 95
) -> bytes:
    """Returns uint8[H, W, 3] as a "png", "webp" or "jpeg" that carries `text` and the same mark.

    WebP and JPEG have the XMP mark, and the text as JSON in EXIF's ImageDescription.
    """
    if kind == "png":
        return encode_png(pixels, text)
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps({**text, _MARKER: "true"})
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(
        buffer, format=kind.upper(), quality=quality, exif=exif, xmp=_XMP_PACKET.encode()
    )
    return buffer.getvalue()


def read_text(source: str | Path | bytes) -> dict[str, str]:
    """The text that `encode_picture` put into a picture, once all of it was looked at.

    Raises:
      ImageError: it cannot be decoded to its end, a PNG's checksums are wrong, or there is no such
        text.
    """
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        formats = ("PNG", "WEBP", "JPEG")
        with Image.open(io.BytesIO(data), formats=formats) as image:
            image.verify()  # leaves nothing to be read
        with Image.open(io.BytesIO(data), formats=formats) as image:
            image.load()
            if image.format == "PNG":
                return {key: str(value) for key, value in image.text.items()}
            found = json.loads(image.getexif()[ExifTags.Base.ImageDescription])
            return {str(key): str(value) for key, value in found.items()}
    except Exception as error:  # of Pillow's decoders, as in `read_image`
        where = "a picture" if isinstance(source, bytes) else source
        raise ImageError(f"{where} is no whole picture of this project: {error!r}") from error


def read_png_text(path: str | Path) -> dict[str, str]:
    """Returns the text fields of a PNG, the mark of generated pictures included."""
    with Image.open(path, formats=("PNG",)) as image:
        image.load()
        return {key: str(value) for key, value in image.text.items()}
