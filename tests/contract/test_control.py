"""The control service and its client over a real socket, before a manager without sessions."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from contextlib import aclosing
from typing import TYPE_CHECKING

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # type: ignore[import-untyped]

from fake_manager import FakeManager
from postcopyd.control import convert, rpc_errors
from postcopyd.control.client import ControlClient
from postcopyd.control.server import ControlServer, address_of
from postcopyd.errors import CATALOGUE, Code, ConfigError, MigrationError, PostcopyError
from postcopyd.health.readiness import Readiness
from postcopyd.status import Latency, Limits, MigrationStatus, State, ThreadBlocktime
from postcopyd.v1 import control_pb2 as pb
from postcopyd.v1 import control_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DEFAULT_LIMITS = Limits(push_rate=1 << 20, weight=50)


@pytest.fixture
def manager() -> FakeManager:
    return FakeManager()


@pytest.fixture
async def server(manager: FakeManager, tmp_path: Path) -> AsyncIterator[ControlServer]:
    # A name that must survive gRPC's decoding of addresses.
    async with ControlServer(manager, f"{tmp_path}/a %41.sock", default_limits=DEFAULT_LIMITS) as server:
        yield server


@pytest.fixture
async def client(server: ControlServer) -> AsyncIterator[ControlClient]:
    async with ControlClient(server.path) as client:
        yield client


async def test_a_migration_lives_through_the_api(client: ControlClient, manager: FakeManager) -> None:
    prepared = await client.prepare(
        "vm-1", ["a:1", "b:2"], socket_path="/tmp/s", limits=Limits(5, 6), epoch=7
    )
    assert prepared == manager.get("vm-1")
    spec = manager.specs[0]
    assert (spec.sources, spec.socket_path, spec.limits, spec.epoch) == (
        ("a:1", "b:2"),
        "/tmp/s",
        Limits(5, 6),
        7,
    )
    assert await client.get("vm-1") == prepared
    assert await client.list() == [prepared]
    assert (await client.set_limits("vm-1", Limits(0, 9))).limits == Limits(0, 9)
    assert (await client.cancel("vm-1")).state is State.CANCELLED


async def test_what_is_not_given_takes_the_daemons_defaults(
    client: ControlClient, manager: FakeManager
) -> None:
    await client.prepare("vm-1", ["a:1"])
    assert (manager.specs[0].limits, manager.specs[0].epoch) == (DEFAULT_LIMITS, None)
    await client.prepare("vm-2", ["a:1"], limits=Limits(), epoch=0)
    assert (manager.specs[1].limits, manager.specs[1].epoch) == (Limits(), 0)


async def test_errors_keep_their_code_and_sentence_on_the_way(
    client: ControlClient, manager: FakeManager
) -> None:
    await client.prepare("vm-1", ["a:1"])
    with pytest.raises(MigrationError, match="migration vm-1 exists") as caught:
        await client.prepare("vm-1", ["a:1"])
    assert caught.value.code is Code.MIGRATION_EXISTS
    manager.change("vm-1", state=State.RUNNING)
    with pytest.raises(MigrationError) as caught:
        await client.cancel("vm-1")
    assert caught.value.code is Code.MIGRATION_UNFINISHED
    assert (await client.cancel("vm-1", force=True)).state is State.CANCELLED
    with pytest.raises(MigrationError) as caught:
        await client.get("vm-2")
    assert caught.value.code is Code.MIGRATION_UNKNOWN


@pytest.mark.parametrize(
    "request_",
    [
        pb.PrepareRequest(id="vm", sources=[]),
        pb.PrepareRequest(id="vm", sources=["a:1"] * 17),
        pb.PrepareRequest(id="vm", sources=["unix:/etc/shadow"]),
        pb.PrepareRequest(id="../vm", sources=["a:1"]),
        pb.PrepareRequest(id="", sources=["a:1"]),
        pb.PrepareRequest(id="vm", sources=["a:1"], socket_path="relative"),
        pb.PrepareRequest(id="vm", sources=["a:1"], socket_path="/" + "x" * 200),
        pb.PrepareRequest(id="vm", sources=["a:1"], limits=pb.Limits(weight=1001)),
        pb.PrepareRequest(id="vm", sources=["a:1"], limits=pb.Limits(push_rate=1 << 63)),
    ],
)
async def test_nonsense_from_any_client_stops_at_the_edge(
    server: ControlServer, manager: FakeManager, request_: pb.PrepareRequest
) -> None:
    async with grpc.aio.insecure_channel(address_of(server.path)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await control_pb2_grpc.ControlStub(channel).Prepare(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata() or ())[rpc_errors.CODE_KEY] == Code.ARGUMENT_INVALID
    assert manager.specs == []


def test_every_code_survives_the_way_to_the_client() -> None:
    for code, entry in CATALOGUE.items():
        assert rpc_errors.status_of(code) is not grpc.StatusCode.OK
        trailer = grpc.aio.Metadata((rpc_errors.CODE_KEY, str(code)))
        arrived = rpc_errors.error_of(
            grpc.aio.AioRpcError(rpc_errors.status_of(code), grpc.aio.Metadata(), trailer, details="why"),
            "/c",
        )
        assert type(arrived) is entry.error
        assert (arrived.code, arrived.message, arrived.exit_status) == (code, "why", entry.error.exit_status)


async def test_watch_sends_the_state_now_the_changes_and_the_end(
    client: ControlClient, manager: FakeManager
) -> None:
    await client.prepare("vm-1", ["a:1"])
    seen = []
    async with aclosing(client.watch("vm-1", interval_s=0.01)) as states:
        async for status in states:
            seen.append(status.state)
            if status.state is State.PREPARED:
                manager.change("vm-1", state=State.RUNNING)
            elif status.state is State.RUNNING:
                manager.change("vm-1", state=State.COMPLETE)
    assert seen == [State.PREPARED, State.RUNNING, State.COMPLETE]


async def test_watch_merges_what_happens_within_an_interval(
    client: ControlClient, manager: FakeManager
) -> None:
    await client.prepare("vm-1", ["a:1"])
    seen = []
    async with aclosing(client.watch("vm-1", interval_s=0.02)) as states:
        async for status in states:
            seen.append(status.faults)
            if len(seen) == 1:
                for faults in range(1, 100):
                    manager.change("vm-1", faults=faults)
                manager.change("vm-1", state=State.COMPLETE)
    assert seen == [0, 99]


async def test_watch_sends_no_more_often_than_asked(client: ControlClient, manager: FakeManager) -> None:
    await client.prepare("vm-1", ["a:1"])
    seen: list[MigrationStatus] = []

    async def follow() -> None:
        async for status in client.watch("vm-1", interval_s=3600):
            seen.append(status)
            first.set()

    first = asyncio.Event()
    following = asyncio.create_task(follow())
    await first.wait()
    for faults in range(1, 20):
        manager.change("vm-1", faults=faults)
        await client.get("vm-1")  # time for a message to overtake
    assert len(seen) == 1
    following.cancel()


async def test_a_watcher_that_goes_away_is_forgotten(client: ControlClient, manager: FakeManager) -> None:
    await client.prepare("vm-1", ["a:1"])
    async with aclosing(client.watch("vm-1")) as states:
        await anext(states)
        assert len(manager.watchers) == 1
    await manager.watcher_left.wait()
    assert manager.watchers == []


async def test_watching_what_is_not_there_says_so(client: ControlClient) -> None:
    with pytest.raises(MigrationError) as caught:
        await anext(client.watch("vm-9"))
    assert caught.value.code is Code.MIGRATION_UNKNOWN


async def test_nobody_there_is_control_unreachable(tmp_path: Path) -> None:
    async with ControlClient(str(tmp_path / "absent.sock")) as client:
        with pytest.raises(ConfigError, match=r"no postcopyd answers at .*absent\.sock") as caught:
            await client.list()
    assert caught.value.code is Code.CONTROL_UNREACHABLE


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(manager: FakeManager, tmp_path: Path) -> None:
    path = str(tmp_path / "c.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    async with ControlServer(manager, path), ControlClient(path) as client:
        assert await client.list() == []
        with pytest.raises(ConfigError, match="already listens"):
            await ControlServer(manager, path).start()
        assert await client.list() == [], "the first server lost its socket"
    assert not (tmp_path / "c.sock").exists()


async def test_what_is_no_socket_is_never_removed(manager: FakeManager, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ConfigError, match="no socket"):
        await ControlServer(manager, str(path)).start()
    assert path.read_text() == "data"


async def test_a_path_that_cannot_be_bound_is_a_configuration_error(
    manager: FakeManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", path)

    path = str(tmp_path / "c.sock")
    with monkeypatch.context() as patch:
        patch.setattr(os, "chmod", refused)
        with pytest.raises(ConfigError, match="no socket can be made"):
            await ControlServer(manager, path).start()
    async with ControlServer(manager, path), ControlClient(path) as client:
        assert await client.list() == [], "the failed server let go of its socket"


async def test_only_owner_and_group_may_connect(server: ControlServer) -> None:
    assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o660


async def test_health_follows_set_serving(server: ControlServer) -> None:
    async with grpc.aio.insecure_channel(address_of(server.path)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for serving, state in ((None, "NOT_SERVING"), (True, "SERVING"), (False, "NOT_SERVING")):
            if serving is not None:
                await server.set_serving(serving)
            for name in ("", "postcopyd.v1.Control"):
                reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status) == state


async def test_health_follows_readiness(server: ControlServer) -> None:
    readiness = Readiness()
    following = asyncio.create_task(server.follow(readiness))
    async with grpc.aio.insecure_channel(address_of(server.path)) as channel:
        states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await states.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        readiness.release("starting")
        assert (await states.read()).status == health_pb2.HealthCheckResponse.SERVING
        readiness.hold("stopping", "asked to stop")
        assert (await states.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        states.cancel()
    following.cancel()


async def test_reflection_names_the_service(server: ControlServer) -> None:
    async with grpc.aio.insecure_channel(address_of(server.path)) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        async for reply in call:
            assert "postcopyd.v1.Control" in {
                service.name for service in reply.list_services_response.service
            }


def test_a_status_survives_the_conversion() -> None:
    status = MigrationStatus(
        id="vm",
        state=State.RECOVERING,
        socket_path="/s",
        sources=("a:1",),
        limits=Limits(3, 4),
        epoch=(1 << 64) - 1,
        fault_latency_us=Latency(1, 2.0, 3.0, 4.0, 5.0),
        blocktime=(ThreadBlocktime(1, 2, 3),),
        memory_short=True,
        elapsed_s=1.5,
        error_code="source.closed",
        error="gone",
    )
    # Each field another number, so that two swapped ones show.
    counters = {name: n for n, name in enumerate(convert._SAME) if type(getattr(status, name)) is int}
    status = msgspec.structs.replace(status, **counters)
    assert convert.status_from_pb(convert.status_to_pb(status)) == status


def test_the_protocol_carries_every_field_or_says_so() -> None:
    ours = set(MigrationStatus.__struct_fields__) - convert.NOT_CARRIED
    theirs = set(pb.Migration.DESCRIPTOR.fields_by_name)
    assert {"fault_latency" if name == "fault_latency_us" else name for name in ours} == theirs


def test_a_state_of_a_newer_daemon_is_refused() -> None:
    with pytest.raises(PostcopyError, match="reports state 0"):
        convert.status_from_pb(pb.Migration(id="vm"))
