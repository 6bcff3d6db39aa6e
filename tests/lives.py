"""A database's life for tests of what stands on it: open, without a bus that it is kept on."""

from __future__ import annotations

from nats.aio.client import Client

from kit import bus, incarnation, postgres


def open_life(pool: postgres.Pool) -> incarnation.Incarnation:
    """One that lets everything be done."""
    life = incarnation.Incarnation("test", pool, bus.Bus(Client()), 3600)
    life._open()  # pyright: ignore[reportPrivateUsage]
    return life
