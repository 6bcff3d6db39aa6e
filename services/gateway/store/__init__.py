"""Every SQL statement of the gateway, by what it is about."""

from __future__ import annotations

from kit import postgres
from services.gateway.store.accounts import AccountStore
from services.gateway.store.admissions import AdmissionStore
from services.gateway.store.batches import BatchStore
from services.gateway.store.deliveries import DeliveryStore
from services.gateway.store.erasures import ErasureStore
from services.gateway.store.findings import FindingStore
from services.gateway.store.limits import LimitStore
from services.gateway.store.measures import MeasureStore
from services.gateway.store.principals import PrincipalStore
from services.gateway.store.recovery import RecoveryStore
from services.gateway.store.removals import RemovalStore
from services.gateway.store.sweeping import SweepStore
from services.gateway.store.templates import TemplateStore
from services.gateway.store.videos import VideoStore
from services.gateway.store.webhooks import EndpointStore


class Store:
    """The gateway's database."""

    def __init__(self, pool: postgres.Pool) -> None:
        self.accounts = AccountStore(pool)
        self.admissions = AdmissionStore(pool)
        self.principals = PrincipalStore(pool)
        self.limits = LimitStore(pool)
        self.videos = VideoStore(pool)
        self.sweeping = SweepStore(pool)
        self.batches = BatchStore(pool)
        self.findings = FindingStore(pool)
        self.removals = RemovalStore(pool)
        self.measures = MeasureStore(pool)
        self.erasures = ErasureStore(pool)
        self.recovery = RecoveryStore(pool)
        self.templates = TemplateStore(pool)
        self.endpoints = EndpointStore(pool)
        self.deliveries = DeliveryStore(pool)
