"""Settings of the credits service, from CREDITS_* in the environment."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from kit import config

_HERE = Path(__file__).parent


class Settings(config.ServiceSettings):
    """What the credits service is told."""

    model_config = SettingsConfigDict(env_prefix="CREDITS_")

    generator_address: str = "127.0.0.1:50053"
    """host:port of the generator, asked about overdue holds."""
    prices_file: Path = _HERE / "prices.yaml"
    """The price book that is loaded at start."""
    refund_policy_file: Path = _HERE / "refund_policy.yaml"
    """The refund policy that is loaded at start."""
    quote_seconds: int = Field(default=900, ge=1, le=86_400)
    """How long a quote is kept to."""
    balance_low_credits: int = Field(default=20, ge=0)
    """BALANCE_LOW is told when an account's available credits fall below this; 0: never."""
    posting_shards: int = Field(default=1, ge=1, le=4)
    """Queues that accounts are spread over, each with at most two batches on their way, on a connection each. More than
    one where the way to the database is long: where it is short they only make batches smaller."""
    unsettled_after_seconds: float = Field(default=600, ge=0)
    """How old a terminal event without a hold gets before it is laid aside."""
    unsettled_retry_seconds: float = Field(default=30, gt=0)
    """How long until such an event is looked at again."""
    hold_overdue_seconds: float = Field(default=1800, gt=0)
    """How long a hold is open before the generator is asked, and between two questions."""
    floor_seconds: float = Field(default=15, gt=0)
    """Pause between two looks for overdue holds."""
    expiry_seconds: float = Field(default=60, gt=0)
    """Pause between two looks for due lots of idle accounts."""
    check_books_seconds: float = Field(default=3600, gt=0)
    """Pause between two proofs of the whole ledger."""

    def page_secret(self) -> bytes:
        """What signs page tokens, the same in every replica."""
        base = self.service_token_secret.get_secret_value().encode()
        return hmac.digest(base, b"credits page tokens", hashlib.sha256)
