"""The worker process: `python -m services.storage.media.worker`, started by `sandbox`.

Reads requests and writes answers as length-prefixed JSON on stdin and stdout, one at a time. Media
travels as files. The process confines itself before it loads a decoder.
"""

import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from services.storage.media import confine, facts

Answer = dict[str, Any]


def main() -> None:
    settings = json.loads(sys.argv[1])
    # Decoders print to stdout at times, which would break the framing.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    limits = confine.Limits(**settings["limits"])
    confine.confine(limits, settings["parent_pid"])
    if settings["signing"]:
        operations = _signing(**settings["signing"])
    else:
        operations = _operations(
            facts.ImageLimits(**settings["image_limits"]),
            facts.VideoLimits(**settings["video_limits"]),
            facts.VideoLimits(**settings["input_video_limits"]),
        )
    _send(answers, {"ready": True})
    while (request := _receive(sys.stdin.buffer)) is not None:
        confine.grant_cpu(limits)
        _send(answers, _answer(operations, request))


def _operations(
    image_limits: facts.ImageLimits,
    video_limits: facts.VideoLimits,
    input_video_limits: facts.VideoLimits,
) -> dict[str, Callable[[dict[str, Any]], Answer]]:
    from services.storage.media import images, marks, remakes, videos  # only behind the confinement

    def inspect_image(args: dict[str, Any]) -> Answer:
        return asdict(images.inspect(Path(args["path"]), image_limits))

    def sanitise_image(args: dict[str, Any]) -> Answer:
        return _written(images.sanitise(Path(args["path"]), image_limits), args["out"])

    def fit_image(args: dict[str, Any]) -> Answer:
        fitted = images.fit(Path(args["path"]), *_fit(args), image_limits)
        return _written(fitted, args["out"])

    def inspect_video(args: dict[str, Any]) -> Answer:
        return asdict(videos.inspect(Path(args["path"]), video_limits))

    def decode_video(args: dict[str, Any]) -> Answer:
        return asdict(videos.decode(Path(args["path"]), video_limits))

    def poster(args: dict[str, Any]) -> Answer:
        return _written(videos.poster(Path(args["path"]), video_limits), args["out"])

    def mark_video(args: dict[str, Any]) -> Answer:
        partial = facts.partial_path(args["out"])
        answer = asdict(marks.mark(Path(args["path"]), partial, _mark(args)))
        partial.replace(args["out"])
        return answer

    def mark_tail(args: dict[str, Any]) -> Answer:
        body = marks.tail(Path(args["path"]), _mark(args))
        return _saved(body, args["out"], facts.Tail(len(body)))

    def clean_video(args: dict[str, Any]) -> Answer:
        return asdict(remakes.clean(Path(args["path"]), Path(args["out"]), input_video_limits))

    def fit_video(args: dict[str, Any]) -> Answer:
        path, out = Path(args["path"]), Path(args["out"])
        return asdict(remakes.fit(path, out, *_fit(args), video_limits))

    def make_rendition(args: dict[str, Any]) -> Answer:
        path, out = Path(args["path"]), Path(args["out"])
        return asdict(remakes.rendition(path, out, args["height"], video_limits))

    of_images = (inspect_image, sanitise_image, fit_image)
    of_videos = (inspect_video, decode_video, poster, mark_video, mark_tail)
    making = (clean_video, fit_video, make_rendition)
    return {run.__name__: run for run in (*of_images, *of_videos, *making)}


def _signing(
    algorithm: str, certificate_file: str, key_file: str
) -> dict[str, Callable[[dict[str, Any]], Answer]]:
    """Of a worker that holds a key: it signs, and does nothing else."""
    from services.storage.media import signing  # only behind the confinement

    signer = signing.Signer(algorithm, Path(certificate_file), Path(key_file))

    def sign_video(args: dict[str, Any]) -> Answer:
        partial = facts.partial_path(args["out"])
        paths = Path(args["path"]), Path(args["original"]), partial
        answer = asdict(signer.sign(*paths, args["change"]))
        partial.replace(args["out"])
        return answer

    return {"sign_video": sign_video}


def _fit(args: dict[str, Any]) -> tuple[int, int, facts.FitMode, facts.Crop | None]:
    crop = facts.Crop(**args["crop"]) if args["crop"] else None
    return args["width"], args["height"], facts.FitMode(args["mode"]), crop


def _mark(args: dict[str, Any]) -> facts.Mark:
    what = args["mark"]
    return facts.Mark(**(what | {"created_at": datetime.fromisoformat(what["created_at"])}))


def _written(rendered: facts.Rendered, out: str) -> Answer:
    return _saved(rendered.body, out, rendered.facts)


def _saved(body: bytes, out: str, about: facts.ImageFacts | facts.Tail) -> Answer:
    partial = facts.partial_path(out)
    partial.write_bytes(body)
    partial.replace(out)
    return asdict(about)


def _answer(operations: dict[str, Callable[[dict[str, Any]], Answer]], request: Answer) -> Answer:
    try:
        return {"facts": operations[request["operation"]](request)}
    except facts.MediaRefused as error:
        return {"refused": error.reason, "message": str(error)}
    except MemoryError:
        return {"exhausted": "memory"}
    except OSError as error:
        if error.errno == errno.EFBIG:  # the bound of RLIMIT_FSIZE
            return {"exhausted": "output size"}
        return {"failed": f"{type(error).__name__}: {error}"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _receive(stream: BinaryIO) -> dict[str, Any] | None:
    header = stream.read(4)
    if len(header) < 4:
        return None
    return json.loads(stream.read(int.from_bytes(header, "big")))


def _send(stream: BinaryIO, answer: Answer) -> None:
    body = json.dumps(answer).encode()
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


if __name__ == "__main__":
    main()
