"""The client of the control service, for the CLI and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import grpc

from postcopyd.status import MigrationSpec, OnLoss
from postcopyd.v1 import control_pb2 as pb
from postcopyd.v1 import control_pb2_grpc

from . import convert, rpc_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Sequence
    from types import TracebackType

    from postcopyd.status import Limits, MigrationStatus

MAX_REPLY_BYTES = 64 << 20


class ControlClient:
    """A connection to the daemon at `path`; use as an async context manager.

    Every method raises the PostcopyError that the daemon reported, or ConfigError(CONTROL_UNREACHABLE).

    Args:
        path: the control socket.
        timeout_s: for each call but `watch`, whose length is the migration's.
    """

    def __init__(self, path: str, *, timeout_s: float = 30.0) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(
            f"unix:{quote(path)}",
            options=[("grpc.max_receive_message_length", MAX_REPLY_BYTES), ("grpc.enable_http_proxy", 0)],
        )
        self._stub = control_pb2_grpc.ControlStub(self._channel)

    async def prepare(
        self,
        id: str,
        sources: Sequence[str],
        *,
        socket_path: str = "",
        limits: Limits | None = None,
        epoch: int | None = None,
        retry_for_s: float = 0.0,
        on_loss: OnLoss = OnLoss.HOLD,
        present: bytes = b"",
    ) -> MigrationStatus:
        """Make a migration; `limits` None: the daemon's defaults. present: a bitmap of pages not to be fetched."""
        spec = MigrationSpec(
            id, tuple(sources), socket_path, epoch=epoch, retry_for_s=retry_for_s, on_loss=on_loss
        )
        return await self._migration(
            self._stub.Prepare(convert.spec_to_pb(spec, limits, present), timeout=self._timeout_s)
        )

    async def drain(self) -> list[MigrationStatus]:
        """Have every migration finished; returns when no guest needs the daemon, however long that takes."""
        try:
            reply = await self._stub.Drain(pb.DrainRequest())
        except grpc.aio.AioRpcError as error:
            raise rpc_errors.error_of(error, self.path) from error
        return [convert.status_from_pb(message) for message in reply.migrations]

    async def get(self, id: str) -> MigrationStatus:
        return await self._migration(self._stub.Get(pb.GetRequest(id=id), timeout=self._timeout_s))

    async def list(self) -> list[MigrationStatus]:
        try:
            reply = await self._stub.List(pb.ListRequest(), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise rpc_errors.error_of(error, self.path) from error
        return [convert.status_from_pb(message) for message in reply.migrations]

    async def cancel(self, id: str, *, force: bool = False) -> MigrationStatus:
        return await self._migration(
            self._stub.Cancel(pb.CancelRequest(id=id, force=force), timeout=self._timeout_s)
        )

    async def set_limits(self, id: str, limits: Limits) -> MigrationStatus:
        request = pb.SetLimitsRequest(id=id, limits=convert.limits_to_pb(limits))
        return await self._migration(self._stub.SetLimits(request, timeout=self._timeout_s))

    async def watch(self, id: str, *, interval_s: float = 0.25) -> AsyncGenerator[MigrationStatus, None]:
        """Yield the state now, then changes at most every `interval_s`, and the final state last."""
        request = pb.WatchRequest(id=id, interval_ms=max(1, round(interval_s * 1000)))
        call = self._stub.Watch(request)
        try:
            async for message in call:
                yield convert.status_from_pb(message)
        except grpc.aio.AioRpcError as error:
            raise rpc_errors.error_of(error, self.path) from error
        finally:
            call.cancel()  # otherwise the daemon goes on for a caller who stopped reading

    async def close(self) -> None:
        await self._channel.close()

    async def _migration(self, call: Awaitable[pb.Migration]) -> MigrationStatus:
        try:
            return convert.status_from_pb(await call)
        except grpc.aio.AioRpcError as error:
            raise rpc_errors.error_of(error, self.path) from error

    async def __aenter__(self) -> ControlClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
