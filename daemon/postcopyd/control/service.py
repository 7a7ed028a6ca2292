"""The Control service: requests checked, the manager asked, its errors mapped."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from postcopyd.arguments import check_id
from postcopyd.errors import PostcopyError
from postcopyd.v1 import control_pb2 as pb
from postcopyd.v1 import control_pb2_grpc

from . import convert, rpc_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from postcopyd.status import Limits, MigrationStatus

    from .api import MigrationManager

DEFAULT_INTERVAL_S = 0.25
MIN_INTERVAL_S = 0.01
MAX_INTERVAL_S = 3600.0


class ControlService(control_pb2_grpc.ControlServicer):
    """One a daemon. gRPC cancels a call whose client went away; the manager's methods must bear that."""

    def __init__(self, manager: MigrationManager, default_limits: Limits) -> None:
        self._manager = manager
        self._default_limits = default_limits

    async def Prepare(self, request: pb.PrepareRequest, context: rpc_errors.Context) -> pb.Migration:
        try:
            spec = convert.spec_from_pb(request, self._default_limits)
            return convert.status_to_pb(await self._manager.prepare(spec, request.present))
        except PostcopyError as error:
            await rpc_errors.abort(context, error)

    async def Get(self, request: pb.GetRequest, context: rpc_errors.Context) -> pb.Migration:
        try:
            return convert.status_to_pb(self._manager.get(check_id(request.id)))
        except PostcopyError as error:
            await rpc_errors.abort(context, error)

    async def List(self, request: pb.ListRequest, context: rpc_errors.Context) -> pb.ListReply:
        return pb.ListReply(migrations=[convert.status_to_pb(status) for status in self._manager.list()])

    async def Cancel(self, request: pb.CancelRequest, context: rpc_errors.Context) -> pb.Migration:
        try:
            return convert.status_to_pb(await self._manager.cancel(check_id(request.id), force=request.force))
        except PostcopyError as error:
            await rpc_errors.abort(context, error)

    async def SetLimits(self, request: pb.SetLimitsRequest, context: rpc_errors.Context) -> pb.Migration:
        try:
            limits = convert.limits_from_pb(request.limits)
            return convert.status_to_pb(await self._manager.set_limits(check_id(request.id), limits))
        except PostcopyError as error:
            await rpc_errors.abort(context, error)

    async def Drain(self, request: pb.DrainRequest, context: rpc_errors.Context) -> pb.ListReply:
        await self._manager.drain()
        return pb.ListReply(migrations=[convert.status_to_pb(status) for status in self._manager.list()])

    async def Watch(
        self, request: pb.WatchRequest, context: rpc_errors.Context
    ) -> AsyncIterator[pb.Migration]:
        interval_s = request.interval_ms / 1000 if request.interval_ms else DEFAULT_INTERVAL_S
        try:
            async with aclosing(self._states(check_id(request.id), interval_s)) as states:
                async for status in states:
                    yield convert.status_to_pb(status)
        except PostcopyError as error:
            await rpc_errors.abort(context, error)

    async def _states(self, id: str, interval_s: float) -> AsyncGenerator[MigrationStatus, None]:
        """Yield the state now, then one at most every interval while something changes, and the final one.

        The event is cleared before the state is read, so a change in between is seen in the next round.
        """
        pause_s = min(max(interval_s, MIN_INTERVAL_S), MAX_INTERVAL_S)
        clock = asyncio.get_running_loop().time
        self._manager.get(id)
        async with self._manager.changes(id) as changed:
            while True:
                changed.clear()
                status = self._manager.get(id)
                sent = clock()
                yield status
                if status.state.is_final:
                    return
                await changed.wait()
                await asyncio.sleep(max(0.0, sent + pause_s - clock()))
