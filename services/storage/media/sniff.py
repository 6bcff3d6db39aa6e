"""What a file is, by its first bytes alone: names and declared types are never believed."""

import struct

from services.storage.media import facts
from services.storage.media.facts import Reason

MEDIA_TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "AVIF": "image/avif",
}
VIDEO_MEDIA_TYPES = {
    "mp4": "video/mp4",
    "mov": "video/quicktime",
    "webm": "video/webm",
    "matroska": "video/matroska",
}
AVIF_BRANDS = (b"avif", b"avis")
STILL_BRANDS = (*AVIF_BRANDS, b"mif1", b"msf1", b"heic", b"heix", b"hevc", b"heim", b"heis")

_KNOWN_BUT_NOT_ALLOWED = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\1\0", "ICO"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"SIMPLE  =", "FITS"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
)
_ALLOWED = "Send a JPEG, PNG, WebP or AVIF image."
HEAD_BYTES = 1024


def image_format(data: bytes) -> str:
    """A key of MEDIA_TYPES. Raises MediaRefused for everything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and any(brand in AVIF_BRANDS for brand in _brands(data)):
        return "AVIF"
    name = _other_format(data)
    if name is not None:
        raise facts.MediaRefused(
            Reason.IMAGE_FORMAT_NOT_ALLOWED, f"{name} files are not accepted. {_ALLOWED}"
        )
    raise facts.MediaRefused(Reason.NOT_AN_IMAGE, f"This file is not an image. {_ALLOWED}")


def webp_size(data: bytes) -> tuple[int, int]:
    """The canvas size from the header; (0, 0) when the header is broken, for the decoder to say."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return (0, 0)
    if kind == b"VP8X":
        width = int.from_bytes(body[4:7], "little") + 1
        return (width, int.from_bytes(body[7:10], "little") + 1)
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return ((bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1)
    width, height = struct.unpack("<HH", body[6:10])
    return (width & 0x3FFF, height & 0x3FFF)


def video_container(head: bytes) -> str:
    """mp4, mov, webm or matroska. Raises MediaRefused for everything else.

    The demuxer is chosen here and never by libav's guessing: a playlist (HLS, ffconcat) that calls
    itself a video would make libav open other files and addresses.
    """
    if head[4:8] == b"ftyp" and not any(brand in STILL_BRANDS for brand in _brands(head)[:1]):
        return "mov" if head[8:12] == b"qt  " else "mp4"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "webm" if b"webm" in head[:64] else "matroska"
    raise facts.MediaRefused(
        Reason.NOT_A_VIDEO, "This file is not a video. An MP4 or WebM file is expected."
    )


def _brands(data: bytes) -> list[bytes]:
    """The major brand first, then the compatible ones."""
    size = min(int.from_bytes(data[:4], "big"), len(data), 256)
    return [data[8:12], *(data[at : at + 4] for at in range(16, size - 3, 4))]


def _other_format(data: bytes) -> str | None:
    for magic, name in _KNOWN_BUT_NOT_ALLOWED:
        if data.startswith(magic):
            return name
    if data[4:8] == b"ftyp" and _brands(data)[0] in STILL_BRANDS:
        return "HEIC"
    return "SVG" if b"<svg" in data[:HEAD_BYTES].lower() else None
