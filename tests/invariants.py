"""The invariants of docs/guarantees.md, checked from Postgres, S3, NATS and the simulator's own log."""

from __future__ import annotations

import asyncio
import collections
import hashlib
import json
import urllib.request
from typing import Any

import nats
from nats.js import api

from tests import system as systems

TERMINAL = ("COMPLETED", "FAILED", "CANCELLED")
NO_CHARGE_STATES = ("FAILED",)


async def violations(system: systems.System, *, blind: bool = False) -> list[str]:
    """Every violation found, as "<id>: what", once the system is quiet. `blind`: ambiguous creates may be orphans."""
    gateway = await _rows(system, "gateway", "SELECT video_id, account_id, state FROM videos")
    found: list[str] = []
    found += await _ledger(system)
    found += await _holds(system, gateway)
    found += await _attempts(system)
    found += await _provider(system, blind)
    found += await _events(system, gateway)
    found += await _objects(system)
    return found


async def _rows(system: systems.System, service: str, statement: str) -> list[dict[str, Any]]:
    async with system.database(service) as connection:
        return [dict(row) for row in await connection.fetch(statement)]


async def _ledger(system: systems.System) -> list[str]:
    books = await system.check_books()
    return [f"L1-L7: {finding}" for finding in books.findings]


async def _holds(system: systems.System, videos: list[dict[str, Any]]) -> list[str]:
    holds = {
        row["hold_id"]: row
        for row in await _rows(
            system,
            "credits",
            "SELECT hold_id, state, reserved, captured, released, cause FROM holds",
        )
    }
    found: list[str] = []
    for video in videos:
        state, hold = video["state"], holds.get(video["video_id"])
        if state in TERMINAL and hold is None:
            found.append(f"L5: video {video['video_id']} is {state} without a hold")
        elif state == "COMPLETED" and hold and hold["captured"] != hold["reserved"]:
            found.append(f"L7: video {video['video_id']} COMPLETED but its hold is {hold}")
        elif state in NO_CHARGE_STATES and hold and hold["captured"] != 0:
            found.append(f"L7: video {video['video_id']} {state} but its hold is {hold}")
        if hold and hold["state"] == "HELD":
            found.append(f"L5: hold {video['video_id']} is still held, its video is {state}")
    return found


async def _attempts(system: systems.System) -> list[str]:
    live = await _rows(
        system,
        "generator",
        "SELECT video_id, state FROM attempts WHERE state NOT IN ('COMPLETED', 'FAILED', 'CANCELLED')",
    )
    unnoted = await _rows(
        system,
        "generator",
        """
        SELECT a.attempt_id, a.state FROM attempts a
        WHERE a.state <> (SELECT h.state_after FROM attempt_history h
                          WHERE h.attempt_id = a.attempt_id ORDER BY h.id DESC LIMIT 1)
        """,
    )
    return [f"V1: attempt of {row['video_id']} is {row['state']}" for row in live] + [
        f"J2: attempt {row['attempt_id']} is {row['state']} without its history" for row in unnoted
    ]


async def _provider(system: systems.System, blind: bool) -> list[str]:
    jobs = {
        row["provider_job_id"]: row
        for row in await _rows(
            system,
            "generator",
            """
            SELECT j.provider_job_id, a.video_id, a.number FROM provider_jobs j
            JOIN attempts a USING (attempt_id)
            """,
        )
    }
    answer = await system.simulated("/_sim/log?kind=accepted")
    entries = answer["entries"] if isinstance(answer, dict) else answer
    billed = [entry for entry in entries if entry.get("billed_micros", 0) > 0]
    found: list[str] = []
    paid: collections.Counter[str] = collections.Counter()
    for entry in billed:
        job = jobs.get(entry["id"])
        if job is None:
            if not blind:
                found.append(f"P3: the provider bills {entry['id']}, which no attempt knows")
        else:
            paid[job["video_id"]] += 1
    found += [
        f"P1: video {video} was paid {count} times" for video, count in paid.items() if count > 1
    ]
    return found


async def _events(system: systems.System, videos: list[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    by_video: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
    seen: set[str] = set()
    for headers, data in await stream_events(system):
        if headers["ce-id"] in seen:
            continue
        seen.add(headers["ce-id"])
        event = json.loads(data)
        if "seq" in event:
            kind = event["kind"].removeprefix("EVENT_KIND_")
            by_video[event["videoId"]].append((int(event["seq"]), kind))
    known = {video["video_id"]: video["state"] for video in videos}
    for video_id, told in by_video.items():
        if [seq for seq, _ in told] != list(range(1, len(told) + 1)):
            found.append(f"J4: events of {video_id} are out of order: {told}")
        ends = [kind for _, kind in told if kind in TERMINAL]
        if ends != [known.get(video_id)]:
            found.append(f"J4: {video_id} is {known.get(video_id)} and told {ends}")
    for video_id, state in known.items():
        if state in TERMINAL and video_id not in by_video:
            found.append(f"J4: {video_id} is {state} and nothing was told")
    return found


async def stream_events(system: systems.System) -> list[tuple[dict[str, str], bytes]]:
    """Everything on EVENTS, in stream order."""
    connection = await nats.connect(system.stack.addresses.nats_url)
    try:
        jetstream = connection.jetstream()
        left = (await jetstream.stream_info("EVENTS")).state.messages
        subscription = await jetstream.subscribe(
            "framewire.events.v1.>", ordered_consumer=True, config=api.ConsumerConfig()
        )
        messages = [await subscription.next_msg(timeout=5) for _ in range(left)]
        return [(message.headers or {}, message.data) for message in messages]
    finally:
        await connection.close()


async def _objects(system: systems.System) -> list[str]:
    outputs = await _rows(
        system,
        "generator",
        "SELECT last_event, account_id FROM videos WHERE state = 'COMPLETED'",
    )
    from framewire.events.v1 import event_pb2

    found: list[str] = []
    for row in outputs:
        event = event_pb2.Event.FromString(bytes(row["last_event"]))
        for output in event.completed.outputs:
            client = system.operator
            signed = await client.get_download_url(event.video_id, variant=output.variant)
            data = await asyncio.to_thread(_read, signed.url)
            if hashlib.sha256(data).hexdigest() != output.sha256:
                found.append(
                    f"S2: {output.asset_id} of {event.video_id} has other bytes than recorded"
                )
    return found


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read()
