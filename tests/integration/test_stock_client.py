"""A client that knows none of our contracts: reflection tells it what there is, health whether it is served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf import descriptor, descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import proto_reflection_descriptor_database as reflection

from services.gateway import auth
from tests import gateway_world
from tests import system as systems

T = TypeVar("T")
SERVED = {
    "gateway": {method.partition("/")[0] for method in auth.ROLES},
    "credits": {"framewire.credits.v1.LedgerService"},
    "generator": {"framewire.generator.v1.AttemptService"},
    "storage": {"framewire.storage.v1.StorageService"},
}
OF_GRPC = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def with_channel(address: str, ask: Callable[[grpc.Channel], T]) -> T:
    """The stock client of reflection is a blocking one."""

    def asked() -> T:
        with grpc.insecure_channel(address) as channel:
            return ask(channel)

    return await asyncio.to_thread(asked)


def check(channel: grpc.Channel) -> int:
    request = health_pb2.HealthCheckRequest()
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status


def call(channel: grpc.Channel, method: descriptor.MethodDescriptor, key: str) -> Any:
    """A call by what reflection told alone."""
    send = channel.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    request = message_factory.GetMessageClass(method.input_type)()
    return send(request, metadata=(("authorization", f"Bearer {key}"),), timeout=10)


@pytest.mark.parametrize("service", SERVED)
async def test_every_service_tells_what_it_serves_and_that_it_does(
    system: systems.System, service: str
) -> None:
    def ask(channel: grpc.Channel) -> None:
        database = reflection.ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == SERVED[service] | OF_GRPC
        pool = descriptor_pool.DescriptorPool(database)
        for name in SERVED[service]:
            described = pool.FindServiceByName(name)
            assert len(described.methods) >= 4
            for method in described.methods:
                assert method.input_type.full_name
        assert check(channel) == health_pb2.HealthCheckResponse.SERVING

    await with_channel(system.stack.addresses.listen[service], ask)


async def test_what_reflection_tells_is_enough_to_call(system: systems.System) -> None:
    async with await system.account(1) as client:
        key = (await client.create_api_key()).secret
        models = await client.models()

    def ask(channel: grpc.Channel) -> dict[str, Any]:
        pool = descriptor_pool.DescriptorPool(reflection.ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName("framewire.gateway.v1.AccountService")
        return json_format.MessageToDict(call(channel, service.FindMethodByName("ListModels"), key))

    listed = await with_channel(system.stack.gateway_address, ask)
    assert [model["model"] for model in listed["models"]] == [model.model for model in models]


async def test_where_reflection_is_off_nothing_is_told_but_health(tmp_path: Path) -> None:
    """As deploy/k8s and docker-compose.yml set it: tests/deploy holds that they do."""

    def ask(channel: grpc.Channel) -> grpc.StatusCode:
        assert check(channel) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            reflection.ProtoReflectionDescriptorDatabase(channel).get_services()
        return refused.value.code()  # pyright: ignore[reportAttributeAccessIssue]

    async with gateway_world.running(tmp_path, {"GATEWAY_REFLECTION": "false"}) as world:
        code = await with_channel(world.address, ask)
    assert code is grpc.StatusCode.UNIMPLEMENTED
