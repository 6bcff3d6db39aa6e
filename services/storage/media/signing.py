"""Content Credentials (C2PA): a signed statement in the file of what made a video, and of what it was made from.

Runs in a worker of its own, which holds the key and never loads a decoder of ours.
"""

import hashlib
from pathlib import Path
from typing import Any

import c2pa

from services.storage.media import facts, marks

FORMAT = "video/mp4"
_PARENT = "source"
_READ_BYTES = 1024 * 1024
_ALGORITHMS = {
    "es256": c2pa.C2paSigningAlg.ES256,
    "es384": c2pa.C2paSigningAlg.ES384,
    "es512": c2pa.C2paSigningAlg.ES512,
    "ps256": c2pa.C2paSigningAlg.PS256,
    "ed25519": c2pa.C2paSigningAlg.ED25519,
}


class Signer:
    """Signs with one key. No time stamp server is asked: a worker has no network."""

    def __init__(self, algorithm: str, certificate_file: Path, key_file: Path) -> None:
        self._signer = c2pa.Signer.from_info(
            c2pa.C2paSignerInfo(
                alg=_ALGORITHMS[algorithm],
                sign_cert=certificate_file.read_bytes(),
                private_key=key_file.read_bytes(),
                ta_url=None,
            )
        )

    def sign(self, path: Path, original: Path, target: Path, change: str) -> facts.MarkedVideo:
        """Copies a marked video to target with the statement in it. Raises ValueError when it has no mark.

        Where `original`, which it was made from, has a statement of its own (a provider's, or ours in what a rendition
        is made from), that one is kept, and `change` says what was done to it; else the video was made by its model.
        """
        what = marks.read_mark(path)
        if what is None:
            raise ValueError("only marked videos are signed")
        kept = _statement(original)
        builder = c2pa.Builder(_manifest(what, change if kept else ""))
        if kept:
            with original.open("rb") as stream:
                parent = {"relationship": "parentOf", "label": _PARENT, "title": "source"}
                builder.add_ingredient(parent, FORMAT, stream)
        with path.open("rb") as source, target.open("w+b") as signed:
            builder.sign(self._signer, FORMAT, source, signed)
        digest = hashlib.sha256()
        with target.open("rb") as signed:
            while piece := signed.read(_READ_BYTES):
                digest.update(piece)
        return facts.MarkedVideo(size_bytes=target.stat().st_size, sha256=digest.hexdigest())


def _statement(path: Path) -> bool:
    """Whether the file has a statement that can be read; whether it is to be believed is for its readers."""
    try:
        with path.open("rb") as stream, c2pa.Reader(FORMAT, stream):
            return True
    except c2pa.C2paError:
        return False


def _manifest(what: facts.Mark, change: str) -> dict[str, Any]:
    made = {
        "action": "c2pa.created",
        "digitalSourceType": marks.SOURCE_TYPE,
        "softwareAgent": {"name": what.model or what.generator},
    }
    opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": [_PARENT]}}
    actions = [opened, {"action": change}] if change else [made]
    about = {"video_id": what.video_id, "model": what.model, "source_sha256": what.source_sha256}
    return {
        "claim_generator_info": [{"name": what.generator}],
        "title": what.video_id,
        "format": FORMAT,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": "dev.framewire.video", "data": about},
        ],
    }
