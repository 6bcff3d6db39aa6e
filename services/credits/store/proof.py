"""The proof that the books balance: every row of the ledger against the rows that it must agree with."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from kit import errors, postgres
from services.credits import rules
from services.credits.store import rulebooks

MOST_FINDINGS = 100
CHECK_SECONDS = 300.0
_ROWS_AT_ONCE = 500

# Each gives one sentence for each row that disagrees.
_CHECKS = (
    # L1: every transfer sums to zero, and its line on the statement is what its entries say.
    """
    SELECT format('transfer %s-%s: %s lines sum to %s; available %s, entries say %s; held %s, entries say %s',
        t.account_id, t.seq, e.lines, e.total, t.available_change, e.available, t.held_change, e.held)
    FROM transfers t CROSS JOIN LATERAL (
        SELECT count(*) AS lines, coalesce(sum(credits), 0) AS total,
            coalesce(sum(credits) FILTER (WHERE book = 'available'), 0) AS available,
            coalesce(sum(credits) FILTER (WHERE book = 'held'), 0) AS held
        FROM entries WHERE entries.account_id = t.account_id AND entries.seq = t.seq
    ) e
    WHERE e.lines < 2 OR e.total <> 0 OR e.available <> t.available_change OR e.held <> t.held_change
    """,
    # L2, L3: balances are the sum of the entries and of the lots, not negative, and the numbers have no gap.
    """
    SELECT format('account %s: available %s, entries say %s, lots say %s; held %s, entries say %s, lots say %s; '
        'newest transfer %s of %s', a.account_id, a.available, coalesce(e.available, 0),
        coalesce(l.available, 0), a.held, coalesce(e.held, 0), coalesce(l.held, 0),
        a.last_seq, coalesce(t.transfers, 0))
    FROM accounts a
    LEFT JOIN (
        SELECT account_id, count(*) AS transfers, max(seq) AS newest FROM transfers GROUP BY account_id
    ) t USING (account_id)
    LEFT JOIN (
        SELECT account_id, sum(credits) FILTER (WHERE book = 'available') AS available,
            sum(credits) FILTER (WHERE book = 'held') AS held
        FROM entries GROUP BY account_id
    ) e USING (account_id)
    LEFT JOIN (
        SELECT account_id, sum(available) AS available, sum(held) AS held FROM lots GROUP BY account_id
    ) l USING (account_id)
    WHERE a.available <> coalesce(e.available, 0) OR a.available <> coalesce(l.available, 0)
        OR a.held <> coalesce(e.held, 0) OR a.held <> coalesce(l.held, 0)
        OR a.last_seq <> coalesce(t.newest, 0) OR a.last_seq <> coalesce(t.transfers, 0)
        OR a.available < 0 OR a.held < 0
    """,
    # Each lot is the sum of its entries, and what it holds is pinned by open holds.
    """
    SELECT format('lot %s: available %s, entries say %s; held %s, entries say %s, open holds say %s',
        l.lot_id, l.available, coalesce(e.available, 0), l.held, coalesce(e.held, 0), coalesce(p.held, 0))
    FROM lots l
    LEFT JOIN (
        SELECT lot_id, sum(credits) FILTER (WHERE book = 'available') AS available,
            sum(credits) FILTER (WHERE book = 'held') AS held
        FROM entries WHERE lot_id IS NOT NULL GROUP BY lot_id
    ) e USING (lot_id)
    LEFT JOIN (
        SELECT lot_id, sum(credits) AS held FROM hold_lots WHERE captured + released = 0 GROUP BY lot_id
    ) p USING (lot_id)
    WHERE l.available <> coalesce(e.available, 0) OR l.held <> coalesce(e.held, 0)
        OR l.held <> coalesce(p.held, 0) OR l.available < 0 OR l.held < 0
    """,
    # L5: a hold is settled once, wholly, and its numbers are those of its transfers and of its parts.
    """
    SELECT format('hold %s (%s): reserved %s, transfers say %s, parts say %s; captured %s, transfers say %s; '
        'released %s, transfers say %s; refunded %s, transfers say %s', h.hold_id, h.state,
        h.reserved, coalesce(t.reserved, 0), coalesce(p.credits, 0), h.captured, coalesce(t.captured, 0),
        h.released, coalesce(t.released, 0), h.refunded, coalesce(t.refunded, 0))
    FROM holds h
    LEFT JOIN (
        SELECT hold_id, sum(held_change) FILTER (WHERE kind = 'RESERVE') AS reserved,
            -sum(held_change) FILTER (WHERE kind = 'CAPTURE') AS captured,
            -sum(held_change) FILTER (WHERE kind = 'RELEASE') AS released,
            sum(available_change) FILTER (WHERE kind = 'REFUND') AS refunded
        FROM transfers WHERE hold_id IS NOT NULL GROUP BY hold_id
    ) t USING (hold_id)
    LEFT JOIN (
        SELECT hold_id, sum(credits) AS credits, sum(captured) AS captured, sum(released) AS released
        FROM hold_lots GROUP BY hold_id
    ) p USING (hold_id)
    WHERE h.reserved <> coalesce(t.reserved, 0) OR h.reserved <> coalesce(p.credits, 0)
        OR h.captured <> coalesce(t.captured, 0) OR h.captured <> coalesce(p.captured, 0)
        OR h.released <> coalesce(t.released, 0) OR h.released <> coalesce(p.released, 0)
        OR h.refunded <> coalesce(t.refunded, 0) OR h.refunded > h.captured
    """,
    # What was kept of a day's spending is what its transfers say, up to where it goes.
    """
    SELECT format('daily spending of %s, key %s: %s up to transfer %s, entries say %s', s.account_id, s.key_id,
        s.credits, s.seq, t.credits)
    FROM daily_spending s CROSS JOIN LATERAL (
        SELECT coalesce(sum(t.held_change), 0) AS credits FROM transfers t JOIN holds h USING (hold_id)
        WHERE t.account_id = s.account_id AND t.seq <= s.seq AND t.kind IN ('RESERVE', 'RELEASE')
            AND (s.key_id = '' OR h.key_id = s.key_id)
            AND h.created_at >= s.began AND h.created_at < s.began + interval '1 day'
    ) t
    WHERE t.credits <> s.credits
    """,
    # Nothing stands beside the books: each line belongs to a transfer, and to a lot of its own account.
    """
    SELECT format('entry %s-%s-%s: %s', e.account_id, e.seq, e.line, CASE
        WHEN t.account_id IS NULL THEN 'it belongs to no transfer'
        ELSE format('its lot %s is another account''s', e.lot_id) END)
    FROM entries e
    LEFT JOIN transfers t ON t.account_id = e.account_id AND t.seq = e.seq
    LEFT JOIN lots l ON l.lot_id = e.lot_id
    WHERE t.account_id IS NULL OR (e.lot_id IS NOT NULL AND l.account_id IS DISTINCT FROM e.account_id)
    """,
)


@dataclass(frozen=True, slots=True)
class Proof:
    """What CheckBooks found; no findings: the books balance."""

    findings: tuple[str, ...]
    transfers: int
    accounts: int
    open_holds: int
    recomputed_holds: int


async def prove(connection: postgres.Connection, books: rulebooks.RulebookStore) -> Proof:
    """Compares everything, in the transaction's one snapshot and in bounded memory."""
    findings: list[str] = []
    for check in _CHECKS:
        rows = await connection.fetch(
            f"{check} LIMIT {MOST_FINDINGS - len(findings)}", timeout=CHECK_SECONDS
        )
        findings += [row[0] for row in rows]
    findings += await _changed_rulebooks(connection)
    recomputed = 0
    async with contextlib.aclosing(_wrong_amounts(connection, books)) as sentences:
        async for sentence in sentences:
            recomputed += 1
            if sentence:
                findings.append(sentence)
            if len(findings) >= MOST_FINDINGS:
                break
    counts: Any = await connection.fetchrow(
        """
        SELECT (SELECT count(*) FROM transfers) AS transfers,
            (SELECT count(*) FROM accounts) AS accounts,
            (SELECT count(*) FROM holds WHERE state = 'HELD') AS open_holds
        """,
        timeout=CHECK_SECONDS,
    )
    return Proof(
        tuple(findings[:MOST_FINDINGS]),
        counts["transfers"],
        counts["accounts"],
        counts["open_holds"],
        recomputed,
    )


async def _changed_rulebooks(connection: postgres.Connection) -> list[str]:
    """A version whose content is not what was loaded would prove anything."""
    rows = connection.cursor("SELECT kind, version, content_hash, content FROM rulebooks")
    return [
        f"rulebook {row['kind']} {row['version']}: its content was changed"
        async for row in rows
        if rules.content_hash(row["content"]) != row["content_hash"]
    ]


async def _wrong_amounts(
    connection: postgres.Connection, books: rulebooks.RulebookStore
) -> AsyncGenerator[str, None]:
    """L7, hold by hold: a sentence where the amounts are not what the versions on it say, else "".

    What an operator captured or released has no verdict: of that only the price is computed again.
    """
    rows = connection.cursor(
        """
        SELECT hold_id, account_id, state, item, verdict, cause, reserved, captured, price_version,
            policy_version
        FROM holds WHERE state IN ('HELD', 'CAPTURED', 'RELEASED')
        """,
        prefetch=_ROWS_AT_ONCE,
    )
    async for row in rows:
        try:
            wrong = await _wrong_amount(connection, books, row)
        except (errors.ServiceError, LookupError, TypeError, ValueError) as error:
            wrong = f"what it was priced and settled by cannot be read: {error!r}"
        yield f"hold {row['hold_id']} ({row['state']}): {wrong}" if wrong else ""


async def _wrong_amount(
    connection: postgres.Connection, books: rulebooks.RulebookStore, row: Any
) -> str:
    item = rules.item_from(row["item"])
    book = await books.price_book(connection, row["price_version"])
    price = book.price(item)
    if row["reserved"] != price:
        return f"reserved {row['reserved']}, price book {book.version} says {price}"
    if row["verdict"] is None:
        return ""
    verdict = rules.verdict_from(row["verdict"])
    if (verdict.video_id, verdict.account_id) != (row["hold_id"], row["account_id"]):
        return f"its verdict is of video {verdict.video_id} of account {verdict.account_id}"
    if verdict.cause != row["cause"]:
        return f"its cause is {row['cause']}, its verdict says {verdict.cause}"
    policy = await books.refund_policy(connection, row["policy_version"])
    captured = policy.captured(row["reserved"], item, verdict)
    if row["captured"] != captured:
        return f"captured {row['captured']}, refund policy {policy.version} says {captured}"
    return ""
