"""What an asset is, without any server."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import errors
from services.storage import assets
from services.storage.media import facts

ACCOUNT = "a" * 26
IMAGE = assets.Identity(ACCOUNT, "request", assets.Kind.INPUT_IMAGE)
fractions = st.floats(0, 1)


def reason(raised: pytest.ExceptionInfo[errors.ServiceError]) -> str:
    return raised.value.reason


def test_an_id_is_derived_from_all_four_parts() -> None:
    same = assets.Identity(ACCOUNT, "request", assets.Kind.INPUT_IMAGE)
    others = [
        assets.Identity("b" * 26, "request", assets.Kind.INPUT_IMAGE),
        assets.Identity(ACCOUNT, "other", assets.Kind.INPUT_IMAGE),
        assets.Identity(ACCOUNT, "request", assets.Kind.OUTPUT_VIDEO),
        assets.Identity(ACCOUNT, "request", assets.Kind.INPUT_IMAGE, 1),
        IMAGE.poster(),
    ]
    assert same.asset_id == IMAGE.asset_id
    assert re.fullmatch("[a-z0-9]{26}", IMAGE.asset_id)
    assert len({IMAGE.asset_id, *(other.asset_id for other in others)}) == 6


def test_every_fit_is_an_asset_of_its_own() -> None:
    area = assets.Area(0, 0, 1, 0.5)
    fits = [
        assets.Fit(640, 360),
        assets.Fit(360, 640),
        assets.Fit(640, 360, facts.FitMode.CONTAIN),
        assets.Fit(640, 360, area=area),
        assets.Fit(640, 360, area=assets.Area(0, 0, 0.5, 1)),
        assets.Fit(640, 360, facts.FitMode.CONTAIN, area=area),
    ]
    made = {assets.fitted(ACCOUNT, IMAGE.asset_id, fit).asset_id for fit in fits}
    assert len(made) == len(fits)
    again = assets.fitted(ACCOUNT, IMAGE.asset_id, assets.Fit(640, 360))
    assert again.asset_id in made
    assert again.kind is assets.Kind.RENDITION


def test_a_key_names_the_account_the_asset_the_put_and_the_type() -> None:
    key = assets.object_key(ACCOUNT, IMAGE.asset_id, "n" * 26, "video/mp4")
    assert key == f"{ACCOUNT}/{IMAGE.asset_id}-{'n' * 26}.mp4"
    assert assets.file_name("x", "image/jpeg") == "x.jpg"
    assert assets.file_name("x", "image/new") == "x.bin"
    assert set(assets.BUCKETS) == set(assets.Kind)


@given(fractions, fractions, fractions, fractions, st.integers(1, 9000), st.integers(1, 9000))
def test_a_crop_lies_inside_the_image_and_holds_a_pixel(
    left: float, top: float, right: float, bottom: float, width: int, height: int
) -> None:
    area = assets.Area(left, top, right, bottom)
    if not (left < right and top < bottom):
        with pytest.raises(errors.InvalidArgument) as raised:
            assets.check_area(area)
        assert reason(raised) == "INVALID_FIELD"
        return
    assets.check_area(area)
    crop = assets.crop(area, width, height)
    assert min(crop.left, crop.top) >= 0
    assert min(crop.width, crop.height) >= 1
    assert crop.left + crop.width <= width
    assert crop.top + crop.height <= height


def test_a_crop_of_all_is_all() -> None:
    whole = assets.crop(assets.Area(0, 0, 1, 1), 641, 359)
    assert whole == facts.Crop(0, 0, 641, 359)
    half = assets.crop(assets.Area(0.5, 0, 1, 1), 640, 360)
    assert half == facts.Crop(320, 0, 320, 360)


@pytest.mark.parametrize(
    ("offset", "length", "given_bytes"),
    [(0, 0, 10), (0, 4, 4), (0, 99, 10), (9, 0, 1), (3, 4, 4), (9, 5, 1)],
)
def test_a_range_ends_with_the_asset(offset: int, length: int, given_bytes: int) -> None:
    assert assets.check_range(offset, length, 10) == given_bytes


def test_a_range_behind_the_end_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument) as raised:
        assets.check_range(10, 0, 10)
    assert raised.value.violations[0][0] == "offset"


def test_limits_and_what_was_announced_are_held() -> None:
    assets.check_limit(10, 10)
    with pytest.raises(errors.InvalidArgument) as raised:
        assets.check_limit(11, 10)
    assert reason(raised) == "TOO_LARGE"
    assets.check_arrived(0, "", 5, "ab")
    assets.check_arrived(5, "ab", 5, "ab")
    for size_bytes, sha256 in [(4, ""), (6, ""), (0, "cd")]:
        with pytest.raises(errors.InvalidArgument) as raised:
            assets.check_arrived(size_bytes, sha256, 5, "ab")
        assert reason(raised) == "CHECKSUM_MISMATCH"


@pytest.mark.parametrize("why", facts.Reason)
def test_every_refusal_of_the_sandbox_has_a_reason_of_the_contract(why: facts.Reason) -> None:
    told = assets.refusal(facts.MediaRefused(why, "Send another."))
    assert told.reason in {"NOT_AN_IMAGE", "NOT_A_VIDEO", "TOO_LARGE", "INVALID_FIELD"}
    assert (told.message, told.metadata["detail"]) == ("Send another.", why)
