"""Pictures: what is listed, how each kind is decoded, what is refused, how results are marked."""

import io
import os
import struct
import sys
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, features

from idea_jax.data import folders, images

RED, GREEN, BLUE, GREY = (200, 30, 20), (20, 180, 40), (30, 40, 210), (128, 128, 128)


def quadrants(width=64, height=48):
    """Upper left red, upper right green, lower left blue, lower right grey."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = GREY
    return Image.fromarray(pixels)


def corners(image):
    width, height = image.size
    places = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    return np.array([image.getpixel((int(x * width), int(y * height))) for x, y in places])


def assert_upright(image, tolerance):
    assert image.mode == "RGB"
    np.testing.assert_allclose(corners(image), [RED, GREEN, BLUE, GREY], atol=tolerance)


def png_bytes(values, colour_type):
    """Writes a 16-bit PNG by hand: Pillow itself cannot write 16-bit colour."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# --- listing --------------------------------------------------------------------------------------


def test_list_images_is_sorted_and_reports_the_rest(tmp_path):
    for name in ("b.JPG", "a.png", "c.webp", "d.jpeg", ".DS_Store", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    found, skipped = folders.list_images(tmp_path)
    assert [path.name for path in found] == ["a.png", "b.JPG", "c.webp", "d.jpeg"]
    assert {path.name: reason for path, reason in skipped} == {
        ".DS_Store": "hidden",
        ".hidden.jpg": "hidden",
        "folder.jpg": "sub-folder",
        "gone.png": "not a regular file",
        "notes.txt": "suffix .txt",
        "pipe.png": "not a regular file",
    }


def test_list_images_without_pictures_names_folder_types_and_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(images.ImageError, match=r"no pictures in .*\.webp.*notes\.txt") as caught:
        folders.list_images(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_list_images_refuses_missing_file_and_unreadable(tmp_path, monkeypatch):
    with pytest.raises(images.ImageError, match="does not exist"):
        folders.list_images(tmp_path / "absent")
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(
        images.ImageError, match=r"expected a folder of pictures, got the file .*a\.png"
    ):
        folders.list_images(tmp_path / "a.png")

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)  # root may read everything, so no chmod here
    with pytest.raises(images.ImageError, match="cannot be read: Permission denied"):
        folders.list_images(tmp_path)


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    """Each stored picture is the upright one moved by the inverse of what its tag asks for."""
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    image = quadrants() if stored is None else quadrants().transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    image.save(path, exif=exif, quality=95)
    result = images.read_image(path)
    assert result.size == (64, 48)
    assert_upright(result, 12)
    assert result.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "CMYK"])
def test_colour_modes_keep_their_colours(tmp_path, mode):
    path = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    picture = quadrants().quantize(8) if mode == "P" else quadrants().convert(mode)
    picture.save(path, quality=95)
    with Image.open(path) as stored:
        assert stored.mode == mode
    assert_upright(images.read_image(path), 12 if mode == "CMYK" else 1)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_becomes_rgb(tmp_path, mode):
    grey = quadrants().convert("L")
    path = tmp_path / "grey.png"
    grey.convert(mode).save(path)
    result = images.read_image(path)
    assert result.mode == "RGB"
    expected = grey.convert(mode).convert("L")
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected)[..., None].repeat(3, 2))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "tRNS"])
def test_transparency_is_laid_over_white(tmp_path, kind):
    path = tmp_path / "cut-out.png"
    alpha = Image.new("L", (32, 32), 255)
    alpha.paste(0, (0, 0, 16, 32))  # the left half is transparent over black
    if kind in ("RGBA", "LA"):
        picture = Image.new(kind[:-1], (32, 32), 0)
        picture.putalpha(alpha)
        picture.save(path)
    elif kind == "P":
        picture = Image.fromarray(np.asarray(alpha) // 255, "P")
        picture.putpalette([0, 0, 0, 0, 0, 0])
        picture.save(path, transparency=0)
    else:
        colours = Image.merge("RGB", [alpha.point(lambda v: 0 if v else 7)] * 3)
        colours.save(path, transparency=(7, 7, 7))
    result = np.asarray(images.read_image(path))
    assert (result[:, :16] == 255).all() and (result[:, 16:] == 0).all()


def test_half_transparent_red_over_white_is_pink(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 128)).save(tmp_path / "a.webp", lossless=True)
    assert images.read_image(tmp_path / "a.webp").getpixel((3, 3)) == pytest.approx(
        (255, 127, 127), 1
    )


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_is_scaled_not_clipped(tmp_path, colour_type, channels):
    ramp = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    values = ramp[..., None].repeat(channels, 2)
    if colour_type in (4, 6):
        values[..., -1] = 65535
    path = tmp_path / "deep.png"
    path.write_bytes(png_bytes(values, colour_type))
    result = images.read_image(path)
    assert result.mode == "RGB"
    np.testing.assert_allclose(np.asarray(result)[..., 1], ramp / 257.0, atol=1.0)


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_first_frame_of_animation_is_used(tmp_path, suffix):
    path = tmp_path / f"moving.{suffix}"
    other = Image.new("RGB", (64, 48), (255, 255, 0))
    form = "MPO" if suffix == "jpg" else None  # phones store depth maps as a second JPEG
    quadrants().save(path, format=form, save_all=True, append_images=[other], quality=95)
    with Image.open(path) as stored:
        assert stored.n_frames == 2
    assert_upright(images.read_image(path), 12)


def test_8000_by_8000_is_read(tmp_path):
    Image.new("1", (8000, 8000), 1).save(tmp_path / "large.png")
    image = images.read_image(tmp_path / "large.png")
    assert image.size == (8000, 8000) and image.getpixel((7999, 7999)) == (255, 255, 255)


# --- refusals -------------------------------------------------------------------------------------


def test_text_file_named_jpg_is_named_for_what_it_is(tmp_path):
    (tmp_path / "photo.jpg").write_text("This is my photo, honestly.\n")
    with pytest.raises(
        images.ImageError, match=r"photo\.jpg is not a JPEG.*seems to be a text file"
    ):
        images.read_image(tmp_path / "photo.jpg")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"GIF89a" + bytes(20), "GIF"),
        (b"\xff\xd8\xff", "damaged JPEG"),
        (bytes(range(128, 256)), "no known picture format"),
    ],
)
def test_other_content_is_described(tmp_path, content, kind):
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(images.ImageError, match=kind):
        images.read_image(tmp_path / "photo.png")


def test_gif_and_tiff_decoders_are_never_used(tmp_path):
    for form in ("GIF", "TIFF"):
        quadrants().save(tmp_path / "photo.png", format=form)
        with pytest.raises(images.ImageError, match=f"seems to be a {form}"):
            images.read_image(tmp_path / "photo.png")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_truncated_picture_is_refused_wherever_it_is_cut(tmp_path, form):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=form)
    whole = buffer.getvalue()
    path = tmp_path / "cut.jpg"
    for share in (0.02, 0.1, 0.3, 0.5, 0.8, 0.95):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(images.ImageError, match=r"cut\.jpg .*(cut off|damaged)"):
            images.read_image(path)
    path.write_bytes(whole)
    assert images.read_image(path).size == (64, 64)


@pytest.mark.parametrize("side", [9000, 12000, 50000])
def test_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch, side):
    """Below, at and far above Pillow's own thresholds."""

    def load(self):
        raise AssertionError("the pixels were decoded")

    data = bytearray(png_bytes(np.zeros((1, 1, 3), np.uint16), 2))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "bomb.png").write_bytes(data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(images.ImageError, match=r"bomb\.png .*scale it down"):
        images.read_image(tmp_path / "bomb.png")


def test_pillows_own_warning_is_an_error_too(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 10**12)
    Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")
    with pytest.raises(images.ImageError, match="too large to be decoded safely"):
        images.read_image(tmp_path / "bomb.png")


def test_tiny_missing_and_forbidden_pictures_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (15, 400)).save(tmp_path / "thin.png")
    with pytest.raises(images.ImageError, match=r"thin\.png has 15 x 400 .*at least 16"):
        images.read_image(tmp_path / "thin.png")
    with pytest.raises(images.ImageError, match=r"absent\.png does not exist"):
        images.read_image(tmp_path / "absent.png")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(images.ImageError, match=r"no permission to read .*thin\.png"):
        images.read_image(tmp_path / "thin.png")


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 81), (81, 50), (33, 33)])
@pytest.mark.parametrize("center_crop", [True, False])
def test_to_pixels_follows_the_published_data_set(shape, center_crop):
    """The arithmetic of textual inversion's data set: slice, PIL bicubic, 8 bit, / 127.5 - 1."""
    array = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    expected = array
    if center_crop:
        height, width = shape
        side = min(shape)
        expected = array[
            (height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2
        ]
    resized = Image.fromarray(expected).resize((24, 24), resample=Image.Resampling.BICUBIC)
    expected = (np.array(resized).astype(np.uint8) / 127.5 - 1.0).astype(np.float32)
    result = images.to_pixels(Image.fromarray(array), 24, center_crop=center_crop)
    assert result.dtype == np.float32 and result.shape == (24, 24, 3)
    np.testing.assert_array_equal(result, expected)


def test_to_pixels_center_crop_ignores_the_sides():
    image = Image.new("RGB", (100, 40), RED)
    image.paste(GREEN, (30, 0, 70, 40))
    result = images.to_pixels(image, 16, center_crop=True)
    np.testing.assert_allclose((result + 1) * 127.5, np.broadcast_to(GREEN, (16, 16, 3)), atol=1e-4)
    assert np.ptp(images.to_pixels(image, 16, center_crop=False)[..., 0]) > 1


def test_to_pixels_refuses_other_modes():
    with pytest.raises(images.ImageError, match="got mode L"):
        images.to_pixels(Image.new("L", (32, 32)), 16, center_crop=False)


def test_to_uint8_inverts_the_scaling_of_every_value():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(values[..., None].repeat(3, 2))
    pixels = images.to_pixels(image, 16, center_crop=False)
    assert pixels.min() == -1.0 and pixels.max() == 1.0
    np.testing.assert_array_equal(images.to_uint8(pixels)[..., 0], values)
    np.testing.assert_array_equal(images.to_uint8(np.array([-3.0, 3.0])), [0, 255])
    with pytest.raises(images.ImageError, match="finite"):
        images.to_uint8(np.array([0.0, np.nan]))


def test_image_grid_places_pictures_row_by_row():
    tiles = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)]
    grid = images.image_grid(tiles, columns=2)
    assert grid.shape == (4, 6, 3)
    assert (grid[:2, :3] == 10).all() and (grid[:2, 3:] == 20).all()
    assert (grid[2:, :3] == 30).all() and (grid[2:, 3:] == 255).all()
    assert images.image_grid(tiles, columns=8).shape == (2, 9, 3)
    with pytest.raises(ValueError, match="one shape"):
        images.image_grid([tiles[0], tiles[0][:1]], columns=2)
    with pytest.raises(ValueError, match="expected pictures"):
        images.image_grid([], columns=2)


# --- saving ---------------------------------------------------------------------------------------


def test_save_png_keeps_pixels_text_and_mark(tmp_path):
    pixels = np.random.default_rng(2).integers(0, 256, (8, 9, 3), np.uint8)
    text = {"prompt": "ein Bär 熊 🐻", "seed": "7", "odd": "lone \udc80 surrogate"}
    images.save_png(tmp_path / "new" / "a.png", pixels, text)
    with Image.open(tmp_path / "new" / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert image.info["xmp"]  # Pillow's name for the packet, so it is where readers look
    fields = images.read_png_text(tmp_path / "new" / "a.png")
    assert fields["prompt"] == text["prompt"] and fields["seed"] == "7"
    assert fields["AIGenerated"] == "true"
    packet = ElementTree.fromstring(fields["XML:com.adobe.xmp"])
    (source,) = packet.iter("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert source.text.endswith("/digitalsourcetype/trainedAlgorithmicMedia")


def test_save_png_refuses_other_arrays_and_the_reserved_fields(tmp_path):
    with pytest.raises(ValueError, match=r"expected uint8\[H, W, 3\], got float32"):
        images.save_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.float32), {})
    with pytest.raises(ValueError, match="reserved"):
        images.save_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), {"AIGenerated": "no"})


def test_save_png_failure_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    images.save_png(path, np.zeros((8, 8, 3), np.uint8), {"n": "1"})
    before = path.read_bytes()

    def full(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        images.save_png(path, np.ones((8, 8, 3), np.uint8), {"n": "2"})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


# --- colour profiles ------------------------------------------------------------------------------

# Colourants of RGB spaces, adapted to the D50 of profiles: XYZ of red, green and blue.
SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
DISPLAY_P3 = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)]


def profile(colourants, space=b"RGB ", gamma=None):
    """An ICC profile: of a matrix and a curve, sRGB's own where no gamma is given."""

    def number(x):
        return struct.pack(">i", round(x * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    # para: type 3 is sRGB's curve, type 0 a plain power.
    curve = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045) if gamma is None else (gamma,)
    kind = 3 if gamma is None else 0
    curve = b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + b"".join(map(number, curve))
    text = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 2, 28) + b"\0x"
    tags = {b"desc": text, b"cprt": text, b"wtpt": xyz((0.9642, 1.0, 0.8249))}
    if space == b"RGB ":
        tags |= {
            name + b"XYZ": xyz(v) for name, v in zip((b"r", b"g", b"b"), colourants, strict=True)
        }
        tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    else:
        tags[b"kTRC"] = curve
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    size = struct.pack(">I", 128 + len(table) + len(data))
    head = size + b"\0\0\0\0" + b"\x04\x20\0\0" + b"mntr" + space + b"XYZ " + b"\0" * 12 + b"acsp"
    head += b"\0" * 28 + b"".join(map(number, (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + table + data


def meant(pixel, colourants):
    """The sRGB value of a pixel of another space with sRGB's curve, computed by its definition."""
    x = np.array(pixel) / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    linear = np.linalg.solve(np.array(SRGB).T, np.array(colourants).T @ linear).clip(0, 1)
    x = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * x)


SKIN = (187, 136, 102)  # as a phone with Display P3 stores it
assert meant(SKIN, DISPLAY_P3)[0] - SKIN[0] > 8


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "jpg"),
        ("RGB", "png"),
        ("RGB", "webp"),
        ("RGBA", "png"),
        ("RGBA", "webp"),
        ("P", "png"),
    ],
)
def test_colours_of_a_profile_become_srgb(tmp_path, mode, suffix):
    path = tmp_path / f"photo.{suffix}"
    image = Image.new("RGB", (32, 32), SKIN)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    lossless = {"quality": 100} if suffix == "jpg" else {"lossless": True}
    image.save(path, icc_profile=profile(DISPLAY_P3), **lossless)
    read = np.asarray(images.read_image(path))
    assert read.shape == (32, 32, 3)
    np.testing.assert_allclose(read[16, 16], meant(SKIN, DISPLAY_P3), atol=1.5)


def test_a_profile_and_an_orientation_go_together(tmp_path):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 32), SKIN).save(path, icc_profile=profile(DISPLAY_P3), exif=exif)
    read = images.read_image(path)
    assert read.size == (32, 48)
    np.testing.assert_allclose(read.getpixel((9, 9)), meant(SKIN, DISPLAY_P3), atol=3)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_profile_of_grey_is_applied(tmp_path, mode):
    """A linear grey of 55 is a grey of 127 in sRGB."""
    path = tmp_path / "grey.png"
    value = {"L": 55, "LA": (55, 255), "I;16": 55 * 257}[mode]
    Image.new(mode, (32, 32), value).save(path, icc_profile=profile(None, b"GRAY", gamma=1.0))
    read = images.read_image(path).getpixel((5, 5))
    assert max(read) - min(read) <= 1 and abs(read[0] - 127) <= 2


def test_transparency_is_laid_over_white_after_the_colours_are_converted(tmp_path):
    path = tmp_path / "half.png"
    Image.new("RGBA", (32, 32), (*SKIN, 128)).save(path, icc_profile=profile(DISPLAY_P3))
    expected = meant(SKIN, DISPLAY_P3) * 128 / 255 + 255 * 127 / 255
    np.testing.assert_allclose(images.read_image(path).getpixel((5, 5)), expected, atol=1.5)


def test_a_profile_that_is_srgb_changes_no_bit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for index, data in enumerate((srgb, profile(SRGB))):
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels).save(path, icc_profile=data)
        np.testing.assert_array_equal(np.asarray(images.read_image(path)), pixels)


@pytest.mark.parametrize(
    "broken",
    [b"no profile", profile(DISPLAY_P3)[:200], profile(DISPLAY_P3, b"Lab "), b"\0" * 4096],
)
def test_a_broken_profile_is_a_notice(tmp_path, broken, caplog):
    path = tmp_path / "photo.png"
    Image.new("RGB", (32, 32), SKIN).save(path, icc_profile=broken)
    for _ in range(2):
        assert images.read_image(path).getpixel((5, 5)) == SKIN
    assert caplog.text.count("cannot be used") == 1 and str(path) in caplog.text


def test_a_profile_for_another_mode_than_the_pictures_is_a_notice_or_converted(tmp_path):
    """A grey picture with a profile of colours, as scanners write them."""
    path = tmp_path / "grey.png"
    Image.new("L", (32, 32), 100).save(path, icc_profile=profile(DISPLAY_P3))
    assert images.read_image(path).getpixel((5, 5)) == pytest.approx((100, 100, 100), abs=1)


def test_a_cmyk_profile_is_applied_where_it_can_be(tmp_path, caplog):
    """Its tables are too long for a test; one without them is reported, and the picture read."""
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (32, 32), (0, 80, 120, 10)).save(path, icc_profile=profile(None, b"CMYK"))
    plain = tmp_path / "plain.jpg"
    Image.new("CMYK", (32, 32), (0, 80, 120, 10)).save(plain)
    assert images.read_image(path).tobytes() == images.read_image(plain).tobytes()
    assert "cannot be used" in caplog.text


# --- what phones and browsers write ---------------------------------------------------------------


def save_as(path, image, **settings):
    """Writes a picture in the format of the suffix; skips the test where nothing writes it."""
    if path.suffix == ".heic":
        pillow_heif = pytest.importorskip("pillow_heif")
        pillow_heif.register_heif_opener()
        image.save(path, format="HEIF", quality=95, **settings)
    else:
        image.save(
            path, format="AVIF" if path.suffix == ".avif" else "JPEG", quality=95, **settings
        )


@pytest.mark.parametrize("suffix", [".jfif", ".avif", ".heic"])
def test_photos_of_phones_and_browsers_are_read_upright_and_in_their_colours(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    stored = Image.new("RGB", (64, 48), SKIN)
    stored.paste(GREY, (0, 0, 32, 48))  # left, so above once it is upright
    path = tmp_path / f"photo{suffix}"
    save_as(path, stored, exif=exif.tobytes(), icc_profile=profile(DISPLAY_P3))
    assert folders.list_images(tmp_path)[0] == [path]
    read = images.read_image(path)
    assert read.size == (48, 64)
    np.testing.assert_allclose(read.getpixel((24, 54)), meant(SKIN, DISPLAY_P3), atol=5)
    np.testing.assert_allclose(read.getpixel((24, 10)), GREY, atol=5)


def test_a_heic_that_calls_itself_a_jpeg_is_read(tmp_path):
    save_as(tmp_path / "photo.heic", Image.new("RGB", (64, 48), RED))
    (tmp_path / "photo.heic").rename(tmp_path / "photo.jpg")
    assert images.read_image(tmp_path / "photo.jpg").size == (64, 48)


def test_the_package_that_a_heic_needs_is_named(tmp_path, monkeypatch):
    path = tmp_path / "photo.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(images.ImageError, match="photo.heic is a HEIC.*pip install pillow-heif"):
        images.read_image(path)
    path.write_bytes(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + b"\0" * 40)
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(images.ImageError, match="an AVIF, which this build of Pillow cannot read"):
        images.read_image(path)
