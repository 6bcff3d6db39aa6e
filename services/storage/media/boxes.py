"""The top-level boxes of an MP4 file (ISO/IEC 14496-12). Standard library only."""

import os
from dataclasses import dataclass
from typing import BinaryIO

from services.storage.media import facts
from services.storage.media.facts import Reason

# Fragmented files have two boxes per fragment; more than this is an attack on our time.
MAX_BOXES = 100_000


@dataclass(frozen=True, slots=True)
class Box:
    kind: bytes
    start: int
    header_bytes: int
    size: int
    to_end_of_file: bool
    """The header says size 0: whatever follows belongs to this box."""


def top_level(file: BinaryIO) -> list[Box]:
    """Every top-level box. Raises MediaRefused when the boxes do not end exactly with the file."""
    end = file.seek(0, os.SEEK_END)
    boxes: list[Box] = []
    at = 0
    while at < end:
        if len(boxes) == MAX_BOXES:
            raise _unreadable("it has too many parts")
        box = _box_at(file, at, end)
        boxes.append(box)
        at += box.size
    kinds = {box.kind for box in boxes}
    if b"moov" not in kinds:
        raise _unreadable("its index (the moov box) is missing, so it was probably cut short")
    return boxes


def _box_at(file: BinaryIO, at: int, end: int) -> Box:
    file.seek(at)
    header = file.read(16)
    if len(header) < 8:
        raise _unreadable("it was cut short")
    size, kind, header_bytes = int.from_bytes(header[:4], "big"), header[4:8], 8
    to_end = size == 0
    if to_end:
        size = end - at
    elif size == 1:
        size, header_bytes = int.from_bytes(header[8:16], "big"), 16
    if size < header_bytes or at + size > end:
        raise _unreadable("it was cut short")
    return Box(kind, at, header_bytes, size, to_end)


def _unreadable(why: str) -> facts.MediaRefused:
    return facts.MediaRefused(
        Reason.VIDEO_UNREADABLE, f"The video cannot be read: {why}. Fetch the complete file again."
    )
