"""The machine-readable mark of synthetic video (EU AI Act, Article 50(2)), without re-encoding.

The mark is an XMP packet in a top-level `uuid` box behind the media. Nothing before it moves, so
every sample offset in the file stays right.
"""

import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO
from xml.sax import saxutils

from services.storage.media import boxes, facts, sniff
from services.storage.media.facts import Reason

XMP_UUID = bytes.fromhex("BE7ACFCB97A942E89C71999491E3AFAC")
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACE = "https://framewire.dev/ns/mark/1.0/"

_COPY_BYTES = 1024 * 1024
_MAX_PACKET_BYTES = 64 * 1024
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:framewire="{namespace}"
    xmp:CreatorTool="{generator}"
    xmp:CreateDate="{created_at}"
    Iptc4xmpExt:DigitalSourceType="{source_type}"
    Iptc4xmpExt:AISystemUsed="{model}"
    framewire:Generator="{generator}"
    framewire:Model="{model}"
    framewire:VideoId="{video_id}"
    framewire:SourceSha256="{source_sha256}"
    framewire:CreatedAt="{created_at}"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
_QUOTE = {'"': "&quot;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"}
_UNQUOTE = {text: character for character, text in _QUOTE.items()}


def mark(source: Path, target: Path, what: facts.Mark) -> facts.MarkedVideo:
    """Copies source to target with the mark added; the same arguments give the same bytes.

    Marks already in the file stay; the last one counts. Raises MediaRefused when the source is not
    a whole MP4.
    """
    added = _box(what)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader:
        pieces = _pieces(reader, _mp4_boxes(reader)[-1], added)
        with target.open("wb") as writer:
            for piece in pieces:
                writer.write(piece)
                digest.update(piece)
                size += len(piece)
    return facts.MarkedVideo(size_bytes=size, sha256=digest.hexdigest())


def tail(source: Path, what: facts.Mark) -> bytes:
    """What `mark` would put behind this video; empty where it would not just put something behind it."""
    with source.open("rb") as reader:
        last = _mp4_boxes(reader)[-1]
    return b"" if last.kind == b"mfra" or last.to_end_of_file else _box(what)


def read_mark(path: Path) -> facts.Mark | None:
    """The file's Framewire mark, None when it has none. Raises MediaRefused if not a whole MP4."""
    found = None
    with path.open("rb") as reader:
        for box in _mp4_boxes(reader):
            body_bytes = box.size - box.header_bytes
            if box.kind != b"uuid" or not 16 < body_bytes <= _MAX_PACKET_BYTES:
                continue
            reader.seek(box.start + box.header_bytes)
            body = reader.read(body_bytes)
            if body.startswith(XMP_UUID):
                found = _parse(body[16:]) or found
    return found


def _mp4_boxes(reader: BinaryIO) -> list[boxes.Box]:
    if sniff.video_container(reader.read(sniff.HEAD_BYTES)) not in ("mp4", "mov"):
        raise facts.MediaRefused(
            Reason.VIDEO_UNREADABLE, "Only MP4 files can be marked. Ask for an MP4 output."
        )
    return boxes.top_level(reader)


def _pieces(reader: BinaryIO, last: boxes.Box, added: bytes) -> Iterator[bytes]:
    end = last.start + last.size
    if last.kind == b"mfra":
        # Players find this index of a fragmented file by its distance from the end of the file.
        yield from _range(reader, 0, last.start)
        yield added
        yield from _range(reader, last.start, end)
        return
    if last.to_end_of_file:
        # "To the end of the file" would swallow the mark: the size is written out instead.
        if last.size > 0xFFFFFFFF:
            raise facts.MediaRefused(
                Reason.VIDEO_UNREADABLE, "An MP4 with an open-ended box over 4 GiB is not accepted."
            )
        yield from _range(reader, 0, last.start)
        yield last.size.to_bytes(4, "big")
        yield from _range(reader, last.start + 4, end)
    else:
        yield from _range(reader, 0, end)
    yield added


def _range(reader: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    reader.seek(start)
    left = end - start
    while left > 0:
        chunk = reader.read(min(_COPY_BYTES, left))
        if not chunk:
            raise OSError("the file became shorter while it was copied")
        left -= len(chunk)
        yield chunk


def _box(what: facts.Mark) -> bytes:
    values = {
        "generator": what.generator,
        "model": what.model,
        "video_id": what.video_id,
        "source_sha256": what.source_sha256,
        "created_at": what.created_at.astimezone(UTC).isoformat(),
    }
    quoted = {name: saxutils.escape(value, _QUOTE) for name, value in values.items()}
    packet = _PACKET.format(namespace=NAMESPACE, source_type=SOURCE_TYPE, **quoted)
    body = XMP_UUID + packet.encode()
    if len(body) > _MAX_PACKET_BYTES:
        raise ValueError("the mark is too long")
    return (len(body) + 8).to_bytes(4, "big") + b"uuid" + body


def _parse(packet: bytes) -> facts.Mark | None:
    """Reads what _box wrote, and only that: no XML parser, because the file is not trusted."""
    text = packet.decode(errors="replace")
    if f'xmlns:framewire="{NAMESPACE}"' not in text:
        return None
    found = dict(re.findall(r'framewire:(\w+)="([^"]*)"', text))
    values = {name: saxutils.unescape(value, _UNQUOTE) for name, value in found.items()}
    try:
        return facts.Mark(
            model=values["Model"],
            video_id=values["VideoId"],
            source_sha256=values["SourceSha256"],
            created_at=datetime.fromisoformat(values["CreatedAt"]),
            generator=values["Generator"],
        )
    except (KeyError, ValueError):
        return None
