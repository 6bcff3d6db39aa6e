"""Images made here, whole and broken, through the pure media functions."""

import hashlib
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageCms

from services.storage.media import facts, images
from services.storage.media.facts import Reason


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red left half, blue right half: survives lossy formats and shows orientation."""
    image = Image.new("RGB", size, (220, 20, 20))
    image.paste((20, 20, 220), (size[0] // 2, 0, *size))
    return image.quantize(8) if mode == "P" else image.convert(mode)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    body = io.BytesIO()
    image.save(body, image_format, **options)
    return body.getvalue()


def opened(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body))


def near(found: object, wanted: tuple[int, ...], tolerance: int = 12) -> bool:
    assert isinstance(found, tuple)
    return all(abs(a - b) <= tolerance for a, b in zip(found, wanted, strict=True))


def reason_of(data: bytes) -> Reason:
    with pytest.raises(facts.MediaRefused) as refused:
        images.inspect(data)
    with pytest.raises(facts.MediaRefused) as again:
        images.sanitise(data)
    assert again.value.reason is refused.value.reason
    assert len(str(refused.value)) > 20
    return refused.value.reason


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"x\x9c")


# --- images: what is accepted


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_every_allowed_format_is_inspected_and_sanitised(image_format: str) -> None:
    data = encoded(picture(), image_format)
    found = images.inspect(data)
    assert found == facts.ImageFacts(
        media_type=f"image/{image_format.lower()}",
        width=64,
        height=48,
        has_alpha=False,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    clean = images.sanitise(data)
    assert clean.facts == images.inspect(clean.body)
    assert clean.facts.media_type == "image/jpeg"
    assert near(opened(clean.body).convert("RGB").getpixel((5, 5)), (220, 20, 20))


def test_inspect_reads_a_path_and_never_its_name(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(picture(), "PNG"))
    assert images.inspect(path).media_type == "image/png"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied_and_gone(orientation: int) -> None:
    upright = Image.new("RGB", (64, 32), (0, 0, 0))
    upright.paste((250, 250, 250), (0, 0, 16, 16))  # the corner that must end top left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", exif=exif, quality=95)
    assert (images.inspect(data).width, images.inspect(data).height) == (64, 32)
    clean = opened(images.sanitise(data).body)
    assert clean.size == (64, 32)
    assert near(clean.getpixel((4, 4)), (250, 250, 250))
    assert near(clean.getpixel((60, 28)), (0, 0, 0))
    assert 0x0112 not in clean.getexif()


def test_broken_exif_does_not_spoil_a_whole_picture() -> None:
    for image_format in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(), image_format, exif=b"Exif\0\0not a TIFF header")
        assert images.sanitise(data).facts.width == 64


def test_metadata_does_not_survive_sanitising() -> None:
    exif = Image.Exif()
    exif[0x010E] = "SECRET-EXIF"
    data = encoded(
        picture(), "JPEG", exif=exif, comment=b"SECRET-COMMENT", xmp=b"<x>SECRET-XMP</x>"
    )
    assert data.count(b"SECRET") == 3
    clean = images.sanitise(data + b"SECRET-TAIL<script>").body
    assert b"SECRET" not in clean
    assert set(opened(clean).info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_alpha_is_kept_as_png_and_flattened_on_black_when_fitted() -> None:
    image = picture("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.paste((220, 20, 20, 255), (0, 0, 32, 48))
    data = encoded(image, "PNG")
    assert images.inspect(data).has_alpha
    clean = images.sanitise(data)
    assert (clean.facts.media_type, clean.facts.has_alpha) == ("image/png", True)
    fitted = opened(images.fit(data, 64, 48).body)
    assert near(fitted.getpixel((60, 24)), (0, 0, 0))
    assert near(fitted.getpixel((4, 24)), (220, 20, 20))


def test_an_alpha_channel_that_hides_nothing_is_dropped() -> None:
    clean = images.sanitise(encoded(picture("RGBA"), "PNG"))
    assert clean.facts.media_type == "image/jpeg"


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [
        ("CMYK", "JPEG"),
        ("L", "JPEG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "WEBP"),
        ("RGBA", "AVIF"),
    ],
)
def test_every_mode_becomes_plain_rgb(mode: str, image_format: str) -> None:
    data = encoded(picture(mode), image_format)
    clean = opened(images.sanitise(data).body)
    assert clean.mode == "RGB"
    if mode not in ("L", "1", "LA"):
        assert near(clean.getpixel((5, 5)), (220, 20, 20))
        assert near(clean.getpixel((60, 40)), (20, 20, 220))


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    image = Image.new("I;16", (16, 16), 0x8000)
    pixel = opened(images.sanitise(encoded(image, "PNG")).body).getpixel((8, 8))
    assert near(pixel, (128, 128, 128), 2)


def test_sixteen_bit_colour_is_read() -> None:
    raw = b"".join(b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0) * 8 for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, body) for kind, body in parts)
    assert near(opened(images.sanitise(data).body).getpixel((4, 4)), (255, 128, 0), 3)


def test_palette_transparency_is_alpha() -> None:
    data = encoded(picture("P"), "PNG", transparency=0)
    assert images.inspect(data).has_alpha


@pytest.mark.parametrize("profile", [b"broken", b"\0" * 200])
def test_a_broken_colour_profile_is_ignored(profile: bytes) -> None:
    data = encoded(picture(), "JPEG", icc_profile=profile)
    assert near(opened(images.sanitise(data).body).getpixel((5, 5)), (220, 20, 20))


def test_a_colour_profile_is_converted() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    grey_profile_on_colour = encoded(picture(), "PNG", icc_profile=lab)
    assert images.sanitise(grey_profile_on_colour).facts.width == 64  # mismatch: ignored
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = swapped.find(b"rXYZ"), swapped.find(b"bXYZ")
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    data = encoded(picture(), "PNG", icc_profile=bytes(swapped))
    assert near(opened(images.sanitise(data).body).getpixel((5, 5)), (20, 20, 220), 30)


def test_a_phone_photo_with_a_preview_behind_it_is_one_picture() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(size=(16, 12))])
    assert (images.inspect(data).media_type, images.inspect(data).width) == ("image/jpeg", 64)


# --- images: what is refused


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_truncated_images_are_refused(image_format: str, keep: float) -> None:
    noise = Image.effect_noise((200, 150), 80).convert("RGB")
    data = encoded(noise, image_format)
    assert reason_of(data[: int(len(data) * keep)]) is Reason.IMAGE_TRUNCATED


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.NOT_AN_IMAGE),
        (b"hello", Reason.NOT_AN_IMAGE),
        (b"<!doctype html><html><script>alert(1)</script>", Reason.NOT_AN_IMAGE),
        (b'<?xml version="1.0"?><svg xmlns="x"/>', Reason.IMAGE_FORMAT_NOT_ALLOWED),
        (b"%PDF-1.7\n", Reason.IMAGE_FORMAT_NOT_ALLOWED),
        (b"%!PS-Adobe\n", Reason.IMAGE_FORMAT_NOT_ALLOWED),
        (encoded(picture(), "GIF"), Reason.IMAGE_FORMAT_NOT_ALLOWED),
        (encoded(picture(), "BMP"), Reason.IMAGE_FORMAT_NOT_ALLOWED),
        (encoded(picture(), "TIFF"), Reason.IMAGE_FORMAT_NOT_ALLOWED),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", Reason.IMAGE_FORMAT_NOT_ALLOWED),
        (b"\xff\xd8\xff", Reason.IMAGE_TRUNCATED),
        (b"RIFF\0\0\0\0WEBP", Reason.IMAGE_TRUNCATED),
        (png_header(50_000, 50_000), Reason.IMAGE_TOO_LARGE),
        (png_header(1, 100_000), Reason.IMAGE_TOO_LARGE),
        (png_header(10_000, 5_001), Reason.IMAGE_TOO_LARGE),
        (
            b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0",
            Reason.IMAGE_TOO_LARGE,
        ),
    ],
)
def test_refusals(data: bytes, reason: Reason) -> None:
    assert reason_of(data) is reason


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "AVIF"])
def test_animations_are_refused(image_format: str) -> None:
    frames = [picture(size=(32, 32)), picture("RGB", (32, 32)).rotate(90)]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert reason_of(data) is Reason.IMAGE_ANIMATED


@pytest.mark.parametrize("options", [{"lossless": True}, {"lossless": False}, {"xmp": b"<x/>"}])
def test_webp_sizes_are_judged_before_the_decoder_allocates(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(picture(size=(120, 90)), "WEBP", **options)
    assert images.inspect(data, facts.ImageLimits(max_pixels=120 * 90)).width == 120
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the decoder was called"))
    with pytest.raises(facts.MediaRefused) as refused:
        images.inspect(data, facts.ImageLimits(max_pixels=120 * 90 - 1))
    assert refused.value.reason is Reason.IMAGE_TOO_LARGE


# --- images: fitting


@pytest.mark.parametrize("size", [(1280, 720), (720, 1280), (33, 7), (64, 48)])
@pytest.mark.parametrize("mode", list(facts.FitMode))
@pytest.mark.parametrize("source", [(64, 48), (7, 500), (501, 3), (1357, 187)])
def test_fitted_images_have_exactly_the_size(
    size: tuple[int, int], mode: facts.FitMode, source: tuple[int, int]
) -> None:
    data = encoded(picture(size=source), "PNG")
    first = images.fit(data, *size, mode)
    assert opened(first.body).size == size == (first.facts.width, first.facts.height)
    assert images.fit(data, *size, mode).body == first.body


@pytest.mark.parametrize(
    ("source", "target"), [((2974, 119), (2162, 909)), ((1357, 1877), (2458, 115))]
)
def test_rounding_does_not_leave_the_image(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    data = encoded(picture(size=source), "JPEG")
    assert opened(images.fit(data, *target).body).size == target


def test_contain_shows_everything_and_cover_fills() -> None:
    data = encoded(picture(size=(100, 100)), "PNG")
    contained = opened(images.fit(data, 200, 100, facts.FitMode.CONTAIN).body)
    assert near(contained.getpixel((10, 50)), (0, 0, 0))
    assert near(contained.getpixel((60, 50)), (220, 20, 20))
    covered = opened(images.fit(data, 200, 100, facts.FitMode.COVER).body)
    assert near(covered.getpixel((10, 50)), (220, 20, 20))


@pytest.mark.parametrize("mode", list(facts.FitMode))
def test_a_crop_is_cut_and_scaled(mode: facts.FitMode) -> None:
    data = encoded(picture(size=(100, 50)), "PNG")
    fitted = images.fit(data, 80, 80, mode, facts.Crop(60, 0, 40, 40))
    assert fitted.facts.media_type == "image/jpeg"
    assert near(opened(fitted.body).getpixel((0, 40)), (20, 20, 220))


def test_blurred_bars_are_the_picture_itself_darker_and_soft() -> None:
    data = encoded(picture(size=(100, 100)), "PNG")
    fitted = opened(images.fit(data, 300, 100, facts.FitMode.CONTAIN_BLURRED).body)
    plain = opened(images.fit(data, 300, 100, facts.FitMode.CONTAIN).body)
    assert fitted.crop((104, 0, 196, 100)).tobytes() != bytes(92 * 100 * 3)
    assert near(fitted.getpixel((120, 50)), plain.getpixel((120, 50)))
    left, right = fitted.getpixel((10, 50)), fitted.getpixel((290, 50))
    assert near(left, (132, 12, 12))
    assert near(right, (12, 12, 132))
    assert near(plain.getpixel((10, 50)), (0, 0, 0))


@pytest.mark.parametrize("crop", [(-1, 0, 5, 5), (0, 0, 101, 5), (96, 0, 5, 5), (0, 0, 0, 5)])
def test_a_crop_outside_the_image_is_refused(crop: tuple[int, int, int, int]) -> None:
    data = encoded(picture(size=(100, 50)), "PNG")
    with pytest.raises(facts.MediaRefused) as refused:
        images.fit(data, 10, 10, crop=facts.Crop(*crop))
    assert refused.value.reason is Reason.CROP_OUTSIDE_IMAGE


def test_impossible_fits_are_programmer_errors() -> None:
    data = encoded(picture(), "PNG")
    for width, height in ((0, 5), (5, 8193)):
        with pytest.raises(ValueError, match="must be"):
            images.fit(data, width, height)


def test_facts_import_neither_pillow_nor_pyav() -> None:
    code = (
        "import sys; from services.storage.media import facts, sandbox, sniff, boxes; "
        "sys.exit(any(name.split('.')[0] in ('PIL', 'av') for name in sys.modules))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
