"""Bad files: cut short, bombs, liars, several kinds at once. Made here, byte by byte; nothing is downloaded."""

from __future__ import annotations

import functools
import io
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
from PIL import Image

SIZE = (48, 32)
FOREIGN = (b"<script", b"<html", b"<svg", b"PK\3\4", b"%PDF", b"secret place", b"<?php")
"""What must not be in anything that is given back."""
PNG = b"\x89PNG\r\n\x1a\n"
HTML = b"<html><script>alert(1)</script></html>"
MIB = 1024 * 1024


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """Every pixel another colour, so that no decoder gets off lightly."""
    image = Image.new("RGB", size)
    image.putdata([(x * 5 % 256, y * 7 % 256, (x * y) % 256) for y in range(size[1])
                   for x in range(size[0])])  # fmt: skip
    return image.convert(mode)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@functools.cache
def images() -> dict[str, bytes]:
    """A good image of each kind."""
    return {
        "jpeg": encoded(picture(), "JPEG", quality=90),
        "jpeg_progressive": encoded(picture(), "JPEG", progressive=True),
        "jpeg_cmyk": encoded(picture("CMYK"), "JPEG"),
        "png": encoded(picture(), "PNG"),
        "png_alpha": encoded(picture("RGBA"), "PNG"),
        "png_palette": encoded(picture("P"), "PNG"),
        "webp": encoded(picture(), "WEBP", quality=80),
        "webp_lossless": encoded(picture("RGBA"), "WEBP", lossless=True),
        "avif": encoded(picture(), "AVIF"),
    }


@functools.cache
def videos() -> dict[str, bytes]:
    """A good video of each kind."""
    return {
        "mp4": _film("mp4", "libx264", {}),
        "mp4_index_first": _film("mp4", "libx264", {"movflags": "faststart"}),
        "mp4_fragmented": _film("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        "webm": _film("webm", "libvpx-vp9", {}),
    }


def _film(container_format: str, codec: str, options: dict[str, str]) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "film"
        with av.open(str(path), "w", format=container_format, options=options) as container:
            stream = container.add_stream(codec, rate=12)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for index in range(6):
                frame = av.VideoFrame.from_image(picture(size=(64, 48)))
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path.read_bytes()


def cuts(body: bytes, count: int) -> Iterator[bytes]:
    """The file cut short: at each of its first 24 bytes, at its last ones, and evenly between."""
    step = max(1, len(body) // count)
    lengths = {
        *range(min(24, len(body))),
        *range(0, len(body), step),
        *range(len(body) - 8, len(body)),
    }
    for length in sorted(lengths):
        yield body[:length]


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG, its checksum right."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *extra: bytes, rows: bytes | None = None) -> bytes:
    """A PNG of these chunks; where no rows are given, they are all zeros of the size that it says."""
    if rows is None:
        rows = _zeros((width * 3 + 1) * height)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return PNG + b"".join(body)


def box(kind: bytes, body: bytes) -> bytes:
    """One box of an MP4 or AVIF."""
    return struct.pack(">I", len(body) + 8) + kind + body


@functools.cache
def bombs() -> dict[str, bytes]:
    """Small files that want much: pixels, or text that unpacks to hundreds of MiB."""
    jpeg = images()["jpeg"]
    start = jpeg.index(b"\xff\xc0") + 5
    huge_jpeg = jpeg[:start] + struct.pack(">HH", 65_000, 65_000) + jpeg[start + 4 :]
    webp = images()["webp_lossless"]
    canvas = b"\x10\0\0\0" + (16_383).to_bytes(3, "little") * 2
    extended = b"VP8X" + struct.pack("<I", 10) + canvas
    huge_webp = (
        b"RIFF" + struct.pack("<I", len(webp) - 8 + len(extended)) + b"WEBP" + extended + webp[12:]
    )
    avif = images()["avif"]
    place = avif.index(b"ispe") + 8
    huge_avif = avif[:place] + struct.pack(">II", 30_000, 30_000) + avif[place + 8 :]
    unpacked = _zeros(120 * MIB)
    few = zlib.compress(bytes(1000), 9)
    return {
        "png_pixels": png(30_000, 30_000, rows=few),
        "png_pixels_there": png(8_000, 8_000),
        "png_wide": png(100_000, 1),
        "png_tall": png(1, 100_000),
        "png_largest_numbers": png(2**31 - 1, 2**31 - 1, rows=few),
        "png_nothing": png(0, 0, rows=few),
        "png_rows_unpack_to_120_mib": png(16, 16, rows=unpacked),
        "png_profile_unpacks_to_120_mib": png(16, 16, chunk(b"iCCP", b"p\0\0" + unpacked)),
        "png_text_unpacks_to_120_mib": png(16, 16, chunk(b"zTXt", b"t\0\0" + unpacked)),
        "png_international_text_unpacks": png(16, 16, chunk(b"iTXt", b"t\0\1\0\0\0" + unpacked)),
        "png_many_texts": png(16, 16, *[chunk(b"zTXt", b"t\0\0" + _zeros(1_000_000))] * 100),
        "jpeg_pixels": huge_jpeg,
        "webp_canvas": huge_webp,
        "avif_pixels": huge_avif,
    }


def _zeros(size_bytes: int) -> bytes:
    """So many of them, packed."""
    packer = zlib.compressobj(1)
    full, rest = divmod(size_bytes, MIB)
    pieces = [packer.compress(bytes(MIB)) for _ in range(full)]
    return b"".join(pieces) + packer.compress(bytes(rest)) + packer.flush()


def _exif(body: bytes) -> bytes:
    """The good JPEG with this as its EXIF."""
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 8) + b"Exif\0\0" + body
    jpeg = images()["jpeg"]
    return jpeg[:2] + segment + jpeg[2:]


def _directory(*entries: tuple[int, int, int, bytes], after: int = 0) -> bytes:
    fields = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"MM\0*" + struct.pack(">IH", 8, len(entries)) + fields + struct.pack(">I", after)


@functools.cache
def broken_exif() -> dict[str, bytes]:
    """Whole pictures whose metadata are broken: viewers show them, and so must we."""
    orientation = 0x0112
    return {
        "exif_garbage": _exif(b"\xde\xad\xbe\xef" * 50),
        "exif_empty": _exif(b""),
        "exif_cut_short": _exif(_directory((orientation, 3, 1, b"\0\6\0\0"))[:13]),
        "exif_orientation_0": _exif(_directory((orientation, 3, 1, b"\0\0\0\0"))),
        "exif_orientation_9": _exif(_directory((orientation, 3, 1, b"\0\x09\0\0"))),
        "exif_orientation_text": _exif(_directory((orientation, 2, 4, b"six\0"))),
        "exif_in_a_circle": _exif(_directory((0x8769, 4, 1, b"\0\0\0\x08"), after=8)),
        "exif_counts_too_much": _exif(_directory((0x010E, 2, 2**31 - 1, b"\xff\xff\xff\xff"))),
        "exif_in_png": png(16, 16, chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
        "profile_garbage": encoded(picture(), "JPEG", icc_profile=b"not a profile" * 9),
    }


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("page.html", HTML)
    return buffer.getvalue()


@functools.cache
def polyglots() -> dict[str, bytes]:
    """Files that are an image and something else as well."""
    jpeg, good_png, webp = images()["jpeg"], images()["png"], images()["webp"]
    comment = b"\xff\xfe" + struct.pack(">H", len(HTML) + 2) + HTML
    text = chunk(b"tEXt", b"Comment\0" + HTML)
    return {
        "jpeg_html": jpeg[:2] + comment + jpeg[2:],
        "jpeg_html_behind": jpeg + HTML,
        "jpeg_php_exif": _exif(b"<?php system($_GET[0]); ?>"),
        "jpeg_zip": jpeg + _archive(),
        "png_zip": good_png + _archive(),
        "png_html": good_png[:33] + text + good_png[33:],
        "webp_html": webp + HTML,
        "avif_zip": images()["avif"] + box(b"free", _archive()),
        "pdf_jpeg": b"%PDF-1.7\n1 0 obj<</Filter/DCTDecode>>stream\n" + jpeg + b"\nendstream",
        "gif_script": b"GIF89a/*" + bytes(20) + b"*/=1;alert(1)//;",
        "zip_jpeg": _archive() + jpeg,
    }


@functools.cache
def not_images() -> dict[str, bytes]:
    """Other formats, several pictures at once, nothing at all."""
    pair: Sequence[Image.Image] = [picture(), picture().rotate(180)]
    several = {"save_all": True, "append_images": pair[1:], "duration": 100}
    return {
        "empty": b"",
        "one_byte": b"\xff",
        "zeros": bytes(5000),
        "text": b"hello, I am a photo.jpg",
        "html": HTML,
        "svg": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><script/></svg>",
        "pdf": b"%PDF-1.7\n%%EOF",
        "gif": encoded(pair[0].convert("P"), "GIF"),
        "gif_animated": encoded(pair[0].convert("P"), "GIF", **several),
        "bmp": encoded(pair[0], "BMP"),
        "tiff": encoded(pair[0], "TIFF"),
        "ico": encoded(pair[0], "ICO"),
        "jpeg2000": encoded(pair[0], "JPEG2000"),
        "heic": box(b"ftyp", b"heic\0\0\0\0mif1heic") + box(b"meta", bytes(40)),
        "apng": encoded(pair[0], "PNG", **several),
        "webp_animated": encoded(pair[0], "WEBP", **several),
        "avif_sequence": encoded(pair[0], "AVIF", **several),
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "concat": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        "mp3": b"ID3\4\0\0\0\0\0\0" + b"\xff\xfb\x90\0" * 100,
    }


@functools.cache
def not_videos() -> dict[str, bytes]:
    """What says that it is a video and is none, or a dangerous one."""
    start = box(b"ftyp", b"isom\0\0\2\0isomiso2mp41")
    sizes = b"".join(struct.pack(">I", 2**31 - 1) for _ in range(4))
    deep = b""
    for _ in range(3000):
        deep = box(b"trak", deep) if len(deep) < 60_000 else deep
    return {
        "ftyp_only": start,
        "no_index": start + box(b"mdat", bytes(4000)),
        "empty_index": start + box(b"moov", b""),
        "box_larger_than_file": start + struct.pack(">I", 2**31 - 1) + b"moov" + bytes(50),
        "box_of_64_bits": start + struct.pack(">I", 1) + b"moov" + struct.pack(">Q", 2**63 - 1),
        "box_smaller_than_its_head": start + struct.pack(">I", 4) + b"moov" + bytes(50),
        "many_boxes": start + box(b"free", b"") * 100_001,
        "deep_boxes": start + box(b"moov", deep),
        "index_of_garbage": start + box(b"moov", box(b"mvhd", sizes) + box(b"trak", sizes)),
        "webm_head_only": b"\x1a\x45\xdf\xa3\x9f\x42\x82\x84webm",
        "webm_endless_number": b"\x1a\x45\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff" + bytes(200),
    }
