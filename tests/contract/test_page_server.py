"""The page server as a destination meets it: grpcio clients with protobuf's own messages, over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
from typing import TYPE_CHECKING, Protocol

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from page_source_client import client, describe, fetch
from postcopyd.errors import ConfigError
from postcopyd.source.image import ImageSpec
from postcopyd.source.options import ServerOptions, TlsFiles
from postcopyd.source.progress import Progress, format_line, rates_between, take_sample
from postcopyd.source.server import PageServer, serve
from postcopyd.source.servicer import PagesCall
from postcopyd.v1 import page_source_pb2 as pb
from postcopyd.v1 import page_source_pb2_grpc
from source_support import BULK, DEMAND, IMAGE_ID, PAGE, asking, mixed_content, opening, range_of
from tls_support import make_certificates

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    Stub = page_source_pb2_grpc.PageSourceAsyncStub

DEFAULTS = ServerOptions()
CONTENT = mixed_content(4096, seed=21)


class Serving(Protocol):
    """Serves images with one of the transports, on any port, as long as the context lasts."""

    def __call__(
        self, *specs: ImageSpec, options: ServerOptions = ...
    ) -> contextlib.AbstractAsyncContextManager[PageServer]: ...


@pytest.fixture(params=["grpcio", "native"])
def serving(request: pytest.FixtureRequest) -> Serving:
    @contextlib.asynccontextmanager
    async def start(*specs: ImageSpec, options: ServerOptions = DEFAULTS) -> AsyncIterator[PageServer]:
        options = msgspec.structs.replace(options, transport=request.param)
        server = await serve(specs, "127.0.0.1:0", options)
        try:
            yield server
        finally:
            await server.stop(0)

    return start


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    return path


MEMFD_HOLDER = """
import os, sys
fd = os.memfd_create("ram")
os.write(fd, b"m" * 65536)
print(fd, flush=True)
sys.stdin.read()
"""


async def status_of_stream(stub: Stub, *messages: bytes) -> grpc.StatusCode:
    call = stub.Pages(pb.PageRequest.FromString(message) for message in messages)
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    return await call.code()


async def test_whole_images_arrive_as_they_are(serving: Serving, tmp_path: Path) -> None:
    contents = {f"vm{n}": mixed_content(2048, seed=n) for n in range(3)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    specs = [ImageSpec(name, str(tmp_path / name)) for name in contents]
    async with serving(*specs) as server, client(server.address) as stub:

        async def check(name: str, content: bytes) -> None:
            image = await describe(stub, name)
            assert image.size_bytes == len(content)
            ranges = [range_of(n, at, 1 << 20) for n, at in enumerate(range(0, len(content), 1 << 20))]
            collector = await fetch(stub, image.epoch, ranges, name)
            received = b"".join(collector.memory[n] for n in range(len(ranges)))
            assert hashlib.sha256(received).digest() == hashlib.sha256(content).digest()

        await asyncio.gather(*(check(name, content) for name, content in contents.items()))


async def test_a_memfd_of_another_process_is_served(serving: Serving, tmp_path: Path) -> None:
    holder = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        MEMFD_HOLDER,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    fd = int(await holder.stdout.readline())
    async with serving(ImageSpec(IMAGE_ID, f"/proc/{holder.pid}/fd/{fd}")) as server:
        holder.stdin.close()
        await holder.wait()
        async with client(server.address) as stub:
            image = await describe(stub)
            collector = await fetch(stub, image.epoch, [range_of(1, 0, 65536)])
    assert collector.memory[1] == b"m" * 65536, "the image outlives the process it came from"


async def test_describe_says_what_the_server_holds_to(serving: Serving, image_path: Path) -> None:
    options = ServerOptions(max_ranges=5, max_data_bytes=64 << 10, max_range_bytes=1 << 20)
    async with (
        serving(ImageSpec(IMAGE_ID, str(image_path)), options=options) as server,
        client(server.address) as stub,
    ):
        image = await describe(stub)
        assert (image.max_ranges, image.max_data_bytes, image.max_range_bytes) == (5, 64 << 10, 1 << 20)
        assert [(r.offset, r.size_bytes, r.page_size) for r in image.regions] == [(0, len(CONTENT), PAGE)]
        too_long = opening(image.epoch, range_of(1, 0, (1 << 20) + PAGE))
        assert await status_of_stream(stub, too_long) is grpc.StatusCode.INVALID_ARGUMENT
        too_many = opening(image.epoch, *(range_of(n, 0, PAGE) for n in range(6)))
        assert await status_of_stream(stub, too_many) is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_statuses_of_requests_that_cannot_be_served(serving: Serving, image_path: Path) -> None:
    async with serving(ImageSpec(IMAGE_ID, str(image_path), 42)) as server, client(server.address) as stub:
        other_image = pb.PageRequest(open=pb.Open(image_id="no", run_align=PAGE, max_data_bytes=PAGE))
        cases = {
            opening(41): grpc.StatusCode.FAILED_PRECONDITION,
            other_image.SerializeToString(): grpc.StatusCode.NOT_FOUND,
            asking(range_of(1, 0, PAGE)): grpc.StatusCode.INVALID_ARGUMENT,
            opening(42, range_of(1, 1, PAGE)): grpc.StatusCode.INVALID_ARGUMENT,
            opening(42, range_of(1, len(CONTENT), PAGE)): grpc.StatusCode.OUT_OF_RANGE,
            opening(42, run_align=PAGE + 1): grpc.StatusCode.INVALID_ARGUMENT,
        }
        for message, status in cases.items():
            assert await status_of_stream(stub, message) is status
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await describe(stub, "no")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as epoch:
            await stub.Complete(pb.CompleteRequest(image_id=IMAGE_ID, epoch=41))
        assert epoch.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.aio.AioRpcError) as holes:
            async for _ in stub.Holes(pb.HolesRequest(image_id=IMAGE_ID, epoch=41)):
                pass
        assert holes.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        # And the server lives on.
        assert (await describe(stub)).epoch == 42


async def test_bytes_that_are_no_request_are_invalid(serving: Serving, image_path: Path) -> None:
    async with (
        serving(ImageSpec(IMAGE_ID, str(image_path))) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        pages = channel.stream_stream("/postcopyd.v1.PageSource/Pages")
        call = pages(iter([b"\xff" * 40]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_holes_of_a_terabyte_come_at_once_and_are_zero(serving: Serving) -> None:
    size = 1 << 40
    fd = os.memfd_create("image")
    os.truncate(fd, size)
    os.pwrite(fd, b"x" * PAGE, size // 4)
    async with serving(ImageSpec(IMAGE_ID, f"/proc/self/fd/{fd}")) as server, client(server.address) as stub:
        os.close(fd)
        image = await describe(stub)
        assert image.has_holes
        call = stub.Holes(pb.HolesRequest(image_id=IMAGE_ID, epoch=image.epoch))
        holes = [(hole.offset, hole.length) async for reply in call for hole in reply.holes]
        assert holes == [(0, size // 4), (size // 4 + PAGE, size - size // 4 - PAGE)]
        gib = 1 << 30
        call = stub.Pages(
            iter(
                [
                    pb.PageRequest.FromString(
                        opening(image.epoch, *(range_of(n, n * gib, gib) for n in range(1024)))
                    )
                ]
            )
        )
        answered = data = 0
        async for reply in call:
            answered += sum(run.length for run in reply.runs)
            data += sum(len(run.data) for run in reply.runs)
        assert (answered, data) == (size, PAGE)


async def test_a_file_that_is_truncated_while_served_is_data_loss(serving: Serving, image_path: Path) -> None:
    async with serving(ImageSpec(IMAGE_ID, str(image_path))) as server, client(server.address) as stub:
        image = await describe(stub)
        os.truncate(image_path, PAGE)
        call = stub.Pages(
            iter([pb.PageRequest.FromString(opening(image.epoch, range_of(1, 1 << 20, 1 << 20)))])
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS


async def test_demand_is_answered_while_bulk_is_under_way(serving: Serving, image_path: Path) -> None:
    async with serving(ImageSpec(IMAGE_ID, str(image_path))) as server, client(server.address) as stub:
        image = await describe(stub)
        call = stub.Pages()
        bulk = [range_of(n, 0, len(CONTENT), BULK) for n in range(8)]
        await call.write(pb.PageRequest.FromString(opening(image.epoch, *bulk, max_data=64 << 10)))
        first = await call.read()
        assert isinstance(first, pb.PageReply)
        await call.write(pb.PageRequest(ranges=[range_of(100, PAGE, PAGE, DEMAND)]))
        await call.done_writing()
        seen = []
        while isinstance(reply := await call.read(), pb.PageReply):
            seen += [run.request_id for run in reply.runs]
        assert 100 in seen
        assert any(request_id != 100 for request_id in seen[seen.index(100) :]), "before the bulk was through"


async def test_complete_releases_the_image_and_can_be_repeated(serving: Serving, image_path: Path) -> None:
    async with serving(ImageSpec(IMAGE_ID, str(image_path))) as server, client(server.address) as stub:
        image = await describe(stub)
        request = pb.CompleteRequest(image_id=IMAGE_ID, epoch=image.epoch, pages_installed=1, pages_zero=2)
        assert (await stub.Complete(request)).released
        assert (await stub.Complete(request)).released
        await server.wait_released()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await describe(stub)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert await status_of_stream(stub, opening(image.epoch)) is grpc.StatusCode.NOT_FOUND


async def test_a_restarted_server_of_the_same_file_keeps_the_epoch(
    serving: Serving, image_path: Path
) -> None:
    epochs = []
    for _ in range(2):
        async with serving(ImageSpec(IMAGE_ID, str(image_path))) as server, client(server.address) as stub:
            epochs.append((await describe(stub)).epoch)
    assert epochs[0] == epochs[1]


async def test_a_client_that_never_reads_costs_one_message(serving: Serving, image_path: Path) -> None:
    """At the handler: as long as a write does not finish, nothing more is produced."""
    async with serving(ImageSpec(IMAGE_ID, str(image_path))) as server:
        stream = server.service.open_stream()
        epoch = server.catalog.get(IMAGE_ID).file.epoch
        never, first_write = asyncio.Event(), asyncio.Event()
        written: list[bytes] = []
        asked = asyncio.Queue[bytes]()
        taken = asyncio.Event()

        async def requests() -> AsyncIterator[bytes]:
            yield opening(epoch, range_of(1, 0, len(CONTENT)), max_data=PAGE * 4)
            while True:
                yield await asked.get()
                taken.set()

        async def write(message: bytes) -> None:
            written.append(message)
            first_write.set()
            await never.wait()

        call = asyncio.create_task(PagesCall(stream, requests(), write).run())
        await first_write.wait()
        asked.put_nowait(asking(range_of(2, 0, PAGE, DEMAND)))
        asked.put_nowait(asking(range_of(3, 0, PAGE, DEMAND)))
        await taken.wait()
        assert len(written) == 1
        assert stream.native.answered_bytes <= 16 * PAGE
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        stream.close()


async def test_over_the_network_a_client_that_never_reads_is_bounded(
    serving: Serving, tmp_path: Path
) -> None:
    size = 64 << 20
    path = tmp_path / "image"
    path.write_bytes(b"x" * size)
    async with (
        serving(ImageSpec(IMAGE_ID, str(path))) as server,
        client(server.address) as sleeper,
        client(server.address) as reader,
    ):
        epoch = (await describe(reader)).epoch
        call = sleeper.Pages()
        everything = [range_of(n, 0, size) for n in range(4)]
        await call.write(pb.PageRequest.FromString(opening(epoch, *everything)))
        while not (streams := list(server.service.streams)):
            await describe(reader)
        # Meanwhile another client gets a whole image, so there was time to produce far more.
        collector = await fetch(reader, epoch, [range_of(1, 0, size)])
        assert collector.is_complete
        assert streams[0].native.answered_bytes <= 16 << 20
        call.cancel()


async def test_streams_beyond_the_limit_are_refused_and_places_come_back(
    serving: Serving, image_path: Path
) -> None:
    options = ServerOptions(max_streams=2)
    async with (
        serving(ImageSpec(IMAGE_ID, str(image_path)), options=options) as server,
        client(server.address) as stub,
    ):
        epoch = (await describe(stub)).epoch
        page = range_of(1, 0, PAGE)
        held = [stub.Pages() for _ in range(2)]
        for call in held:
            await call.write(pb.PageRequest.FromString(opening(epoch, page)))
            await call.read()
        # It writes nothing: grpcio reports a write to a stream that has ended as INTERNAL, whatever its status was.
        assert await stub.Pages().code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in held:
            await call.done_writing()
            assert await call.code() is grpc.StatusCode.OK
        # A client may know of the end of its stream before the server has put everything away.
        while server.service.streams:
            await describe(stub)
        assert (await fetch(stub, epoch, [page])).is_complete


async def test_health_and_tls_with_client_certificates(
    serving: Serving, image_path: Path, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path)
    tls = TlsFiles(
        cert=str(tmp_path / "server.pem"), key=str(tmp_path / "server.key"), ca=str(tmp_path / "ca.pem")
    )
    async with serving(ImageSpec(IMAGE_ID, str(image_path)), options=ServerOptions(tls=tls)) as server:
        async with grpc.aio.secure_channel(server.address, certificates.channel_credentials()) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", "postcopyd.v1.PageSource"):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        anonymous = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())
        async with grpc.aio.secure_channel(server.address, anonymous) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await describe(page_source_pb2_grpc.PageSourceStub(channel))  # type: ignore[arg-type]
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_port_that_is_taken_is_named(serving: Serving, image_path: Path) -> None:
    async with serving(ImageSpec(IMAGE_ID, str(image_path))) as server:
        with pytest.raises(ConfigError, match=server.address):
            await serve([ImageSpec(IMAGE_ID, str(image_path))], server.address)


async def test_progress_counts_what_was_served(serving: Serving, image_path: Path) -> None:
    async with serving(ImageSpec(IMAGE_ID, str(image_path))) as server, client(server.address) as stub:
        before = take_sample(server.service, lambda: 0.0)
        epoch = (await describe(stub)).epoch
        half = range_of(1, 0, len(CONTENT) // 2)
        collector = await fetch(stub, epoch, [half])
        after = take_sample(server.service, lambda: 2.0)
        assert after.served_bytes == half.length
        assert after.data_bytes == collector.data_bytes
        assert after.share == 0.5
        rates = rates_between(before, after)
        assert rates.pages == half.length / PAGE / 2
        assert "served 50.0%" in format_line(after, rates)
        assert rates_between(after, after).pages == 0
        Progress(server.service).report(on_terminal=False)
