"""Every SQL statement of the generator, by what it is about."""

from __future__ import annotations

from collections.abc import Callable

from kit import postgres
from services.generator.store.accounts import AccountStore
from services.generator.store.estimates import EstimateStore
from services.generator.store.hints import HintStore
from services.generator.store.late import LateStore
from services.generator.store.measures import MeasureStore
from services.generator.store.operators import OperatorStore
from services.generator.store.outputs import OutputStore
from services.generator.store.queue import QueueStore
from services.generator.store.recovery import RecoveryStore
from services.generator.store.renders import RenderStore
from services.generator.store.submissions import SubmissionStore
from services.generator.store.survey import SurveyStore
from services.generator.store.videos import VideoStore


class Store:
    """The generator's database."""

    def __init__(self, pool: postgres.Pool, told: Callable[[], None]) -> None:
        """`told` is called after each commit that put an event into the outbox."""
        self.videos = VideoStore(pool, told)
        self.accounts = AccountStore(pool)
        self.estimates = EstimateStore(pool)
        self.queue = QueueStore(pool, told)
        self.submissions = SubmissionStore(pool)
        self.renders = RenderStore(pool)
        self.hints = HintStore(pool)
        self.survey = SurveyStore(pool)
        self.outputs = OutputStore(pool)
        self.late = LateStore(pool)
        self.operators = OperatorStore(pool)
        self.measures = MeasureStore(pool)
        self.recovery = RecoveryStore(pool)
