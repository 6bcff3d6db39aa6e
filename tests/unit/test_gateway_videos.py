"""What a request means, and how events change a video."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from google.protobuf import struct_pb2

from framewire.events.v1 import event_pb2, vocabulary_pb2
from framewire.gateway.v1 import video_pb2
from kit import errors
from services.gateway import catalogue, inputs, messages, peers, videos

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
MODELS = catalogue.parse("""
models:
  - {name: one, sizes: [1280x720, 320x180], seconds: [6, 4], max_variants: 2, text_to_video: true,
     max_input_images: 0, options: {seed: {type: integer, min: 0, max: 10},
     strength: {type: number, min: 0, max: 1}, style: {type: string, min: 1, max: 3}, loop: {type: boolean},
     mood: {type: string, choices: [calm, wild]}}}
  - {name: gone, sizes: [320x180], seconds: [4], text_to_video: true, max_input_images: 1,
     retires_at: 2026-09-24}
  - {name: picture, sizes: [320x180], seconds: [4], text_to_video: false, max_input_images: 1}
  - {name: many, sizes: [320x180], seconds: [4], text_to_video: true, max_input_images: 2,
     input_images_at_any_frame: true, max_input_video_seconds: 5, frames_per_second: 24}
""")
PENDING = videos.Video(
    video_id="v" * 26,
    account_id="a" * 26,
    key_id="",
    principal="",
    request_id="r",
    state=videos.State.PENDING,
    stage="QUEUED",
    admit_epoch=1,
    admit_until=NOW,
    spec=b"",
    lane="STANDARD",
    weight=100,
    start_by=NOW,
    input_image_id="i" * 26,
    has_inputs=False,
    quote_id="",
    max_credits=None,
    refusal=None,
    quoted_credits=10,
    captured_credits=0,
    released_credits=0,
    settlement="PENDING",
    revision=1,
    last_seq=0,
    progress_percent=0,
    queue_position=0,
    expected_at=None,
    outputs=b"",
    late_outputs=b"",
    failure_cause=None,
    failure_message="",
    failure_retryable=False,
    cancel_requested=False,
    labels={},
    client_reference="",
    similar_to="",
    retry_of="",
    release_due=False,
    unpin_due=False,
    publishes=1,
    accepted_at=None,
    created_at=NOW,
    started_at=None,
    finished_at=None,
    updated_at=NOW,
    deleted_at=None,
    model="sora-2",
    delete_when_terminal=False,
    delete_due=False,
    revised_at=NOW,
)
QUEUED = videos.Fact(videos.Kind.QUEUED, 1, NOW, queue_position=3)
STARTED = videos.Fact(videos.Kind.STARTED, 2, NOW + timedelta(seconds=1))
COMPLETED = videos.Fact(videos.Kind.COMPLETED, 3, NOW + timedelta(seconds=9), outputs=b"made")
FAILED = videos.Fact(videos.Kind.FAILED, 3, NOW, cause="TIMEOUT", message="too slow")
SETTLED = videos.Fact(videos.Kind.SETTLED, 0, NOW, captured_credits=10)
RECOVERED = videos.Fact(videos.Kind.RECOVERED, 4, NOW, outputs=b"late")


def after(*facts: videos.Fact, video: videos.Video = PENDING) -> videos.Video:
    for fact in facts:
        video = videos.project(video, fact) or video
    return video


def test_the_ordinary_life() -> None:
    queued = after(QUEUED)
    assert (queued.state, queued.queue_position, queued.revision) == ("PENDING", 3, 2)
    started = after(STARTED, video=queued)
    assert (started.state, started.stage, started.queue_position) == ("PROCESSING", "PREPARING", 0)
    done = after(COMPLETED, video=started)
    assert (done.state, done.stage, done.outputs, done.progress_percent) == (
        "COMPLETED",
        "DONE",
        b"made",
        100,
    )
    assert done.unpin_due
    assert not done.finished
    settled = after(SETTLED, video=done)
    assert settled.finished
    assert (settled.captured_credits, settled.revision) == (10, 5)


@pytest.mark.parametrize(
    "order", list(itertools.permutations([QUEUED, STARTED, COMPLETED, SETTLED]))
)
def test_any_order_and_any_repeat_come_to_the_same_end(order: tuple[videos.Fact, ...]) -> None:
    for facts in (order, order + order):
        end = after(*facts)
        assert (end.state, end.outputs, end.settlement) == ("COMPLETED", b"made", "DONE")
        assert (end.started_at, end.last_seq) == (STARTED.occurred_at, 3)
    assert after(*order).revision == after(*order, *order).revision


def test_a_terminal_state_never_changes() -> None:
    failed = after(FAILED)
    assert (failed.state, failed.failure_cause, failed.failure_message) == (
        "FAILED",
        "TIMEOUT",
        "too slow",
    )
    assert videos.project(failed, replace(COMPLETED, seq=9)) is None
    assert videos.project(failed, replace(STARTED, seq=9, occurred_at=NOW)) is None
    late = after(RECOVERED, video=failed)
    assert (late.state, late.late_outputs, late.outputs) == ("FAILED", b"late", b"")


def test_a_terminal_event_ends_a_live_video_whatever_its_number() -> None:
    live = replace(after(QUEUED, STARTED), last_seq=7)
    assert after(COMPLETED, video=live).state == "COMPLETED"
    assert after(COMPLETED, video=live).last_seq == 7


@pytest.mark.parametrize("state", sorted(videos.HIDDEN))
def test_what_was_not_admitted_has_no_events(state: videos.State) -> None:
    assert videos.project(replace(PENDING, state=state), SETTLED) is None
    assert videos.project(replace(PENDING, state=state), COMPLETED) is None


def test_a_start_keeps_the_stage_that_progress_told_before() -> None:
    assert after(STARTED, video=replace(PENDING, stage="RENDERING")).stage == "RENDERING"


def normal(**asked: object) -> videos.Spec:
    return videos.normalise(videos.Spec("a cat", **asked), MODELS, NOW)  # pyright: ignore[reportArgumentType]


def test_every_default_is_filled_in() -> None:
    assert normal() == videos.Spec("a cat", "one", "", 1280, 720, 6, 1, {})
    chosen = normal(model="picture", input_image_id="i" * 26)
    assert (chosen.width, chosen.seconds, chosen.input_image_id) == (320, 4, "i" * 26)
    options = {"seed": 3.0, "strength": 0.5, "style": "abc", "loop": True}
    assert normal(options=options).options == options


IMAGE, CLIP = inputs.Input("i" * 26), inputs.Input("c" * 26, is_video=True)


def later(each: inputs.Input, frame: int = 24) -> inputs.Input:
    return replace(each, frame_index=frame)


def given(*each: inputs.Input, **fields: object) -> dict[str, object]:
    return {"inputs": each, **fields}


def test_inputs_are_said_in_one_way_only() -> None:
    """A first frame as input_image_id, everything else as inputs, by frame."""
    alone = normal(model="many", inputs=(IMAGE,))
    assert (alone.input_image_id, alone.inputs) == (IMAGE.asset_id, ())
    last, cut = later(IMAGE, 95), replace(IMAGE, crop=(0, 0, 0.5, 1))
    assert normal(model="many", inputs=(last, IMAGE)).inputs == (IMAGE, last)
    assert normal(model="many", inputs=(cut,)).inputs == (cut,)
    assert normal(model="many", inputs=(CLIP,)).inputs == (CLIP,)
    assert normal(rendition_heights=(360, 480)).rendition_heights == (480, 360)


def test_a_spec_is_the_same_after_it_was_stored() -> None:
    first = replace(IMAGE, fit="CONTAIN_BLURRED", crop=(0.25, 0, 1, 0.5))
    for one in (
        normal(model="many", inputs=(first, later(IMAGE)), rendition_heights=(90,)),
        normal(model="many", inputs=(later(CLIP),)),
        normal(model="picture", input_image_id="i" * 26),
    ):
        stored = messages.spec_message(one).SerializeToString()
        again = messages.asked_spec(vocabulary_pb2.VideoSpec.FromString(stored))
        assert again == one
        assert videos.normalise(again, MODELS, NOW) == one


def test_only_options_that_cost_go_into_what_is_priced() -> None:
    """The ledger keeps an item for years: what callers write in their own words is not for it."""
    model = catalogue.parse("""
models:
  - {name: a, sizes: [2x2], seconds: [1], text_to_video: true, max_input_images: 0, options: {
      sound: {type: boolean, priced: true}, fps: {type: integer, min: 1, max: 60, priced: true},
      words: {type: string, min: 0, max: 9}}}
""")
    options = {"sound": True, "fps": 24.0, "words": "mine"}
    spec = messages.spec_message(
        videos.normalise(videos.Spec("a cat", options=options), model, NOW)
    )
    made = peers.item(spec, vocabulary_pb2.LANE_VIP, model.default)
    assert dict(made.options) == {"sound": "true", "fps": "24"}
    assert not peers.item(spec, vocabulary_pb2.LANE_VIP, None).options


def test_an_asset_must_be_what_the_input_says() -> None:
    many = MODELS.models["many"]
    for each, kind, seconds, reason in (
        (IMAGE, "INPUT_IMAGE", 0.0, ""),
        (CLIP, "INPUT_VIDEO", 5.04, ""),
        (CLIP, "OUTPUT_VIDEO", 1.0, ""),
        (IMAGE, "INPUT_VIDEO", 1.0, "NOT_AN_IMAGE"),
        (IMAGE, "POSTER", 0.0, "NOT_AN_IMAGE"),
        (CLIP, "INPUT_IMAGE", 0.0, "NOT_A_VIDEO"),
        (CLIP, "RENDITION", 1.0, "NOT_A_VIDEO"),
        (CLIP, "INPUT_VIDEO", 5.2, "INPUT_NOT_SUPPORTED"),
    ):
        if not reason:
            inputs.check_asset(each, many, inputs.Asset(kind, seconds))
            continue
        with pytest.raises(errors.InvalidArgument) as caught:
            inputs.check_asset(each, many, inputs.Asset(kind, seconds))
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    "option",
    [
        "{type: integer}",
        "{type: string, max: 3}",
        "{type: number, min: 2, max: 1}",
        "{type: integer, choices: [a]}",
        "{type: list, min: 0, max: 1}",
        "{type: string, min: 0, max: 9, priced: true}",
    ],
)
def test_an_option_without_bounds_is_no_catalogue(option: str) -> None:
    text = """
models:
  - {name: a, sizes: [2x2], seconds: [1], text_to_video: true, max_input_images: 0, options: {o: OPTION}}
"""
    assert catalogue.parse(text.replace("OPTION", "{type: string, choices: [a]}")).default.options
    with pytest.raises(catalogue.CatalogueError, match="option o"):
        catalogue.parse(text.replace("OPTION", option))


@pytest.mark.parametrize(
    ("asked", "reason", "says"),
    [
        ({"model": "two"}, "MODEL_UNKNOWN", "one, gone, picture, many"),
        ({"width": 100, "height": 100}, "SIZE_NOT_SUPPORTED", "1280x720, 320x180"),
        ({"width": 1280}, "SIZE_NOT_SUPPORTED", "1280x720"),
        ({"seconds": 5}, "SECONDS_NOT_SUPPORTED", "4, 6"),
        ({"variants": 3}, "VARIANTS_NOT_SUPPORTED", "at most 2"),
        ({"input_image_id": "i" * 26}, "INPUT_NOT_SUPPORTED", "starts from: text alone"),
        ({"model": "picture"}, "INPUT_NOT_SUPPORTED", "1 image as the first frame"),
        (given(IMAGE, IMAGE, model="picture"), "INPUT_NOT_SUPPORTED", "from 2 images"),
        (given(CLIP, model="picture"), "INPUT_NOT_SUPPORTED", "1 image as the first frame"),
        (given(later(IMAGE), model="picture"), "INPUT_NOT_SUPPORTED", "at frame 24"),
        (given(IMAGE, CLIP, model="many"), "INPUT_NOT_SUPPORTED", "not from both"),
        (given(CLIP, later(CLIP), model="many"), "INPUT_NOT_SUPPORTED", "a video of at most 5 s"),
        (given(IMAGE, IMAGE, IMAGE, model="many"), "INPUT_NOT_SUPPORTED", "2 images at any frame"),
        (given(IMAGE, IMAGE, model="many"), "INVALID_FIELD", "two are for one frame"),
        (given(later(IMAGE, 96), model="many"), "INVALID_FIELD", "has 96 frames"),
        (
            given(replace(IMAGE, crop=(0.5, 0, 0.5, 1)), model="many"),
            "INVALID_FIELD",
            "left_fraction",
        ),
        (given(IMAGE, input_image_id="i" * 26), "INVALID_FIELD", "is short for one"),
        ({"rendition_heights": (720,)}, "INVALID_FIELD", "below the video's height, 720"),
        ({"rendition_heights": (361,)}, "INVALID_FIELD", "even"),
        ({"options": {"mood": "angry"}}, "OPTION_NOT_SUPPORTED", "mood (one of calm, wild)"),
        ({"options": {"fps": 24}}, "OPTION_NOT_SUPPORTED", "seed (integer, 0 to 10)"),
        ({"options": {"seed": 11}}, "OPTION_NOT_SUPPORTED", "seed"),
        ({"options": {"seed": 1.5}}, "OPTION_NOT_SUPPORTED", "seed"),
        ({"options": {"seed": True}}, "OPTION_NOT_SUPPORTED", "seed"),
        ({"options": {"style": "abcd"}}, "OPTION_NOT_SUPPORTED", "1 to 3 characters"),
        ({"options": {"loop": 1}}, "OPTION_NOT_SUPPORTED", "loop (boolean)"),
        ({"options": {"loop": None}}, "OPTION_NOT_SUPPORTED", "loop (boolean)"),
        ({"prompt": "  \n"}, "INVALID_FIELD", "prompt"),
        ({"model": "gone"}, "MODEL_RETIRING", "2026-09-24"),
    ],
)
def test_what_a_model_has_not_is_refused_with_what_it_has(
    asked: dict[str, object], reason: str, says: str
) -> None:
    with pytest.raises(errors.ServiceError) as caught:
        videos.normalise(videos.Spec(**{"prompt": "a cat", **asked}), MODELS, NOW)  # pyright: ignore[reportArgumentType]
    assert caught.value.reason == reason
    assert says in caught.value.message


def test_start_by_has_a_default_by_lane_and_bounds() -> None:
    within = {lane: videos.start_by(None, lane, NOW) - NOW for lane in videos.LANES}
    assert within == {
        "VIP": timedelta(hours=1),
        "STANDARD": timedelta(days=1),
        "BATCH": timedelta(days=7),
    }
    soon = NOW + timedelta(seconds=1)
    assert videos.start_by(soon, "VIP", NOW) == soon
    for bad, reason in ((NOW, "START_BY_PASSED"), (NOW + timedelta(days=31), "INVALID_FIELD")):
        with pytest.raises(errors.InvalidArgument) as caught:
            videos.start_by(bad, "VIP", NOW)
        assert caught.value.reason == reason


def request(**fields: object) -> video_pb2.CreateVideoRequest:
    made = video_pb2.CreateVideoRequest(
        request_id="one", spec=vocabulary_pb2.VideoSpec(prompt="a cat"), **fields
    )  # pyright: ignore[reportArgumentType]
    made.spec.options["seed"].number_value = 1
    return made


def print_of(made: video_pb2.CreateVideoRequest) -> bytes:
    return videos.fingerprint(messages.own_fields(made))


def test_the_fingerprint_is_of_the_callers_own_fields() -> None:
    same = request(validate_only=True)
    same.request_id = "two"
    assert print_of(same) == print_of(request())
    ordered, other = request(labels={"a": "1", "b": "2"}), request(labels={"b": "2", "a": "1"})
    assert print_of(ordered) == print_of(other)
    different = [request(max_credits=0), request(client_reference="x"), request(labels={"a": "1"})]
    assert len({print_of(made) for made in [request(), *different]}) == 4


def test_the_fingerprint_includes_fields_that_are_not_known_yet() -> None:
    newer = video_pb2.CreateVideoRequest.FromString(request().SerializeToString() + b"\xf8\x7f\x01")
    nested = request()
    spec = nested.spec.SerializeToString() + b"\xf8\x7f\x01"
    nested.spec.CopyFrom(vocabulary_pb2.VideoSpec.FromString(spec))
    assert len({print_of(request()), print_of(newer), print_of(nested)}) == 3


def test_what_json_cannot_carry_is_refused() -> None:
    bad = request()
    bad.spec.options["seed"].number_value = float("nan")
    with pytest.raises(errors.InvalidArgument):
        messages.own_fields(bad)


def test_a_spec_survives_its_message() -> None:
    spec = normal(options={"seed": 3.0, "style": "abc", "loop": True})
    assert messages.asked_spec(messages.spec_message(spec)) == spec
    listed = vocabulary_pb2.VideoSpec(prompt="x")
    listed.options["seed"].list_value.CopyFrom(struct_pb2.ListValue())
    assert messages.asked_spec(listed).options == {"seed": None}


def test_events_as_facts() -> None:
    event = event_pb2.Event(kind=event_pb2.EVENT_KIND_CANCELLED, seq=4)
    event.cancelled.cause = vocabulary_pb2.CAUSE_CANCELLED_BEFORE_SUBMIT
    fact = messages.fact(event)
    assert fact is not None
    assert (fact.kind, fact.seq, fact.cause, fact.cancel_requested) == (
        "CANCELLED",
        4,
        "CANCELLED_BEFORE_SUBMIT",
        True,
    )
    assert messages.fact(event_pb2.Event(kind=event_pb2.EVENT_KIND_BALANCE_LOW)) is None
    assert messages.fact(event_pb2.Event.FromString(b"\x20\x63")) is None, (
        "a kind of a later version"
    )


def test_only_what_is_offered_can_be_asked_for() -> None:
    text = (Path(catalogue.__file__).parent / "models.yaml").read_text()
    assert list(catalogue.parse(text, "sora-2-pro, sora-2").models) == ["sora-2", "sora-2-pro"]
    assert "sora-1" in catalogue.parse(text).models
    with pytest.raises(catalogue.CatalogueError, match="sora-9"):
        catalogue.parse(text, "sora-9")
