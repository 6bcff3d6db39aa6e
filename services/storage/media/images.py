"""Untrusted images: looked at, cleaned and fitted. Pillow only; runs in the worker process."""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageCms, ImageFilter, ImageOps

from services.storage.media import facts, sniff
from services.storage.media.facts import Reason

SANITISED_JPEG_QUALITY = 92
FITTED_JPEG_QUALITY = 95
# Stated, because a fitted image's hash is pinned: a changed library default must not change bytes.
# Level 6 takes 19 s for 50 megapixels of noise, level 2 takes 3 s and gives as small a file.
PNG_COMPRESS_LEVEL = 2
DEFAULT_LIMITS = facts.ImageLimits()
BLURRED_SIDE_PIXELS = 96
"""The longer side of what is blurred: enlarged again, nobody sees that it was small."""
BLURRED_BRIGHTNESS = 0.6

_SRGB = ImageCms.createProfile("sRGB")


def inspect(source: bytes | Path, limits: facts.ImageLimits = DEFAULT_LIMITS) -> facts.ImageFacts:
    """Fully decodes the image and answers its facts. Raises MediaRefused."""
    data = _read(source)
    image = _load(data, limits)
    media_type = sniff.MEDIA_TYPES[sniff.image_format(data)]
    return _facts(media_type, image, data, has_alpha=image.has_transparency_data)


def sanitise(source: bytes | Path, limits: facts.ImageLimits = DEFAULT_LIMITS) -> facts.Rendered:
    """The same picture as a fresh file: upright, sRGB, no metadata. Raises MediaRefused.

    Decoding and encoding again is what ends polyglot files and hidden payloads.
    """
    image = _to_srgb(_load(_read(source), limits))
    if image.mode == "RGBA":
        return _png(image)
    return _jpeg(image, SANITISED_JPEG_QUALITY)


def fit(
    source: bytes | Path,
    width: int,
    height: int,
    mode: facts.FitMode = facts.FitMode.COVER,
    crop: facts.Crop | None = None,
    limits: facts.ImageLimits = DEFAULT_LIMITS,
) -> facts.Rendered:
    """The picture, or a part of it, at exactly width x height, opaque, sRGB; the same input gives the same bytes.

    Raises MediaRefused for the image or the crop, ValueError for impossible arguments.
    """
    facts.check_fit(width, height)
    image = _flatten(_to_srgb(_load(_read(source), limits)))
    return _jpeg(placed(image, width, height, mode, crop), FITTED_JPEG_QUALITY)


def placed(
    image: Image.Image, width: int, height: int, mode: facts.FitMode, crop: facts.Crop | None
) -> Image.Image:
    """An RGB image, or a part of it, brought to that size; also each frame of a video. Raises MediaRefused."""
    area = _whole(image) if crop is None else _checked_crop(image, crop)
    if mode is facts.FitMode.COVER:
        return _cover(image, area, width, height)
    blurred = mode is facts.FitMode.CONTAIN_BLURRED
    behind = _blurred(image, area, width, height) if blurred else Image.new("RGB", (width, height))
    return _contain(image, area, behind)


def _read(source: bytes | Path) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _load(data: bytes, limits: facts.ImageLimits) -> Image.Image:
    """Decoded and upright, or MediaRefused. Dimensions are checked before any pixel is decoded."""
    image_format = sniff.image_format(data)
    if image_format == "WEBP":
        # Pillow's WebP decoder allocates the whole canvas when it opens the file.
        _check_size(sniff.webp_size(data), limits)
    with _refusing_broken_images(limits):
        image = Image.open(io.BytesIO(data), formats=[image_format])
        _check_size(image.size, limits)
        # A JPEG with several pictures (MPO) is an ordinary phone photo with a preview or a gain
        # map behind it: the first picture is the photo.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise facts.MediaRefused(
                Reason.IMAGE_ANIMATED,
                "This image is animated or has several frames. Send a single still image.",
            )
        image.load()
        return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:
        # Cameras and editors write broken EXIF; the picture is whole, and viewers show it as is.
        return image


@contextmanager
def _refusing_broken_images(limits: facts.ImageLimits) -> Iterator[None]:
    """Decoders raise anything from SyntaxError to struct.error at broken files."""
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (facts.MediaRefused, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _too_large(limits) from None
    except Exception as error:
        raise facts.MediaRefused(
            Reason.IMAGE_TRUNCATED,
            "The image is damaged or cut short and cannot be decoded. Upload the complete file.",
        ) from error


def _check_size(size: tuple[int, int], limits: facts.ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels or max(size) > limits.max_side_pixels:
        raise _too_large(limits)


def _too_large(limits: facts.ImageLimits) -> facts.MediaRefused:
    return facts.MediaRefused(
        Reason.IMAGE_TOO_LARGE,
        f"The image has too many pixels: at most {limits.max_pixels / 1e6:g} megapixels and "
        f"{limits.max_side_pixels} pixels per side are accepted. Scale it down.",
    )


def _to_srgb(image: Image.Image) -> Image.Image:
    """RGBA when any pixel is not opaque, else RGB; a new image that carries no metadata."""
    profile = image.info.get("icc_profile")
    alpha = _alpha(image)
    colours = _convert_profile(_without_alpha(image), profile)
    clean = Image.new("RGB", colours.size)
    clean.paste(colours)
    if alpha is not None:
        clean.putalpha(alpha)
    return clean


def _alpha(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _without_alpha(image: Image.Image) -> Image.Image:
    """One of L, RGB and CMYK, the modes that colour profiles describe."""
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    if image.mode.startswith("I"):
        # 16 bits of grey; a plain convert() would clip everything above 255 to white.
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("1", "LA", "La"):
        return image.convert("LA").getchannel("L") if image.mode != "1" else image.convert("L")
    return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")


def _convert_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                _SRGB,
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            # A broken or mismatched profile is common in the wild, and viewers ignore it too.
            pass
    return image.convert("RGB")


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    black = Image.new("RGB", image.size)
    black.paste(image, mask=image.getchannel("A"))
    return black


def _whole(image: Image.Image) -> facts.Crop:
    return facts.Crop(0, 0, image.width, image.height)


def _checked_crop(image: Image.Image, crop: facts.Crop) -> facts.Crop:
    inside = (
        min(crop.left, crop.top) >= 0
        and min(crop.width, crop.height) > 0
        and crop.left + crop.width <= image.width
        and crop.top + crop.height <= image.height
    )
    if not inside:
        raise facts.MediaRefused(
            Reason.CROP_OUTSIDE_IMAGE,
            f"The crop must lie inside the image, which is {image.width} x {image.height} pixels.",
        )
    return crop


def _cover(image: Image.Image, area: facts.Crop, width: int, height: int) -> Image.Image:
    """The largest centred part of the area with the frame's aspect ratio, scaled to the frame."""
    scale = min(area.width / width, area.height / height)
    cut_width, cut_height = width * scale, height * scale
    left = area.left + (area.width - cut_width) / 2
    top = area.top + (area.height - cut_height) / 2
    # Rounding may leave the image by a billionth of a pixel, which Pillow refuses.
    box = (
        max(left, 0.0),
        max(top, 0.0),
        min(left + cut_width, float(image.width)),
        min(top + cut_height, float(image.height)),
    )
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _contain(image: Image.Image, area: facts.Crop, frame: Image.Image) -> Image.Image:
    """All of the area, in the middle of the frame."""
    scale = min(frame.width / area.width, frame.height / area.height)
    inner = (
        min(frame.width, max(1, round(area.width * scale))),
        min(frame.height, max(1, round(area.height * scale))),
    )
    box = (area.left, area.top, area.left + area.width, area.top + area.height)
    scaled = image.resize(inner, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    frame.paste(scaled, ((frame.width - inner[0]) // 2, (frame.height - inner[1]) // 2))
    return frame


def _blurred(image: Image.Image, area: facts.Crop, width: int, height: int) -> Image.Image:
    shrunk = min(1.0, BLURRED_SIDE_PIXELS / max(width, height))
    small = (max(1, round(width * shrunk)), max(1, round(height * shrunk)))
    soft = _cover(image, area, *small).filter(ImageFilter.GaussianBlur(max(small) / 24))
    darker = soft.point(lambda value: value * BLURRED_BRIGHTNESS)
    return darker.resize((width, height), Image.Resampling.BICUBIC)


def _jpeg(image: Image.Image, quality: int) -> facts.Rendered:
    body = io.BytesIO()
    # Full colour resolution: the picture is encoded twice (sanitise, fit) before a model sees it.
    image.save(body, "JPEG", quality=quality, subsampling="4:4:4", optimize=False)
    return _rendered("image/jpeg", image, body.getvalue())


def _png(image: Image.Image) -> facts.Rendered:
    body = io.BytesIO()
    image.save(body, "PNG", compress_level=PNG_COMPRESS_LEVEL, optimize=False)
    return _rendered("image/png", image, body.getvalue())


def _rendered(media_type: str, image: Image.Image, body: bytes) -> facts.Rendered:
    return facts.Rendered(body, _facts(media_type, image, body, has_alpha=image.mode == "RGBA"))


def _facts(
    media_type: str, image: Image.Image, data: bytes, *, has_alpha: bool
) -> facts.ImageFacts:
    return facts.ImageFacts(
        media_type=media_type,
        width=image.width,
        height=image.height,
        has_alpha=has_alpha,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
