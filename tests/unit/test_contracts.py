"""The contracts are served: no RPC is left to the generated base class, and every broken rule has a name."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest

from framewire.credits.v1 import ledger_pb2_grpc
from framewire.gateway.v1 import (
    account_pb2_grpc,
    operator_pb2_grpc,
    template_pb2_grpc,
    upload_pb2_grpc,
    video_pb2_grpc,
    webhook_pb2_grpc,
)
from framewire.generator.v1 import attempt_pb2_grpc
from framewire.storage.v1 import storage_pb2_grpc
from kit import rpc
from services.credits.api import LedgerService
from services.gateway.api.accounts import AccountApi
from services.gateway.api.operators import OperatorApi
from services.gateway.api.templates import TemplateApi
from services.gateway.api.uploads import UploadApi
from services.gateway.api.videos import VideoApi
from services.gateway.api.webhooks import WebhookApi
from services.generator.api import AttemptApi
from services.storage.api import StorageApi

SERVED: dict[ModuleType, type] = {
    ledger_pb2_grpc: LedgerService,
    account_pb2_grpc: AccountApi,
    operator_pb2_grpc: OperatorApi,
    template_pb2_grpc: TemplateApi,
    upload_pb2_grpc: UploadApi,
    video_pb2_grpc: VideoApi,
    webhook_pb2_grpc: WebhookApi,
    attempt_pb2_grpc: AttemptApi,
    storage_pb2_grpc: StorageApi,
}


@pytest.mark.parametrize(("contract", "served"), SERVED.items())
def test_every_rpc_is_ours(contract: ModuleType, served: type[Any]) -> None:
    (base,) = (
        cls
        for name, cls in inspect.getmembers(contract, inspect.isclass)
        if name.endswith("Servicer")
    )
    calls = [name for name, _ in inspect.getmembers(base, inspect.isfunction)]
    assert len(calls) >= 4
    assert [name for name in calls if getattr(served, name) is getattr(base, name)] == []


def test_a_rule_of_a_whole_message_names_the_request() -> None:
    assert rpc.path_text(None) == "request"
