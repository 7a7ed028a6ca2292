"""The control service's server: a UNIX socket, with grpc.health.v1 and reflection beside it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import quote

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from postcopyd.errors import Code, ConfigError
from postcopyd.status import Limits
from postcopyd.v1 import control_pb2 as pb
from postcopyd.v1 import control_pb2_grpc

from . import socket_path
from .service import ControlService

if TYPE_CHECKING:
    from types import TracebackType

    from postcopyd.health.readiness import Readiness

    from .api import MigrationManager

log = structlog.get_logger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Control"].full_name
SOCKET_MODE = 0o660
MAX_CALLS = 256
MAX_REQUEST_BYTES = (32 << 20) + (64 << 10)
"""`prepare` may bring a bit for each 4 KiB page of a guest of 1 TiB."""
STOP_GRACE_S = 1.0


def address_of(path: str) -> str:
    """Return gRPC's name of a UNIX socket; gRPC decodes %-escapes in it."""
    return f"unix:{quote(path)}"


class ControlServer:
    """Serves the control API at a path that only the owner and the group may connect to.

    Whoever may connect can make and cancel migrations: there is no finer right than the socket's mode.
    """

    def __init__(self, manager: MigrationManager, path: str, *, default_limits: Limits | None = None) -> None:
        self.path = path
        self._service = ControlService(manager, default_limits or Limits())
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen; health is NOT_SERVING until `set_serving`.

        Raises:
            ConfigError: the socket cannot be made, or another process listens at it.
        """
        socket_path.claim(self.path)
        server = grpc.aio.server(
            maximum_concurrent_rpcs=MAX_CALLS,
            options=[("grpc.max_receive_message_length", MAX_REQUEST_BYTES)],
        )
        control_pb2_grpc.add_ControlServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        # From here on `close` has something to do, also when the rest fails.
        self._server = server
        try:
            await self.set_serving(False)
            server.add_insecure_port(address_of(self.path))
            os.chmod(self.path, SOCKET_MODE)
            await server.start()
        except (RuntimeError, OSError) as error:
            await self.close()
            raise ConfigError(
                Code.CONFIG_INVALID, f"no socket can be made at {self.path}: {error}"
            ) from error
        log.info("control.listening", path=self.path)

    async def set_serving(self, serving: bool) -> None:
        """Say over grpc.health.v1 whether new migrations are taken."""
        state = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", SERVICE):
            await self._health.set(name, state)

    async def follow(self, readiness: Readiness) -> None:
        """Keep health in step with `readiness` until cancelled."""
        while True:
            readiness.changed.clear()
            await self.set_serving(readiness.is_ready)
            await readiness.changed.wait()

    async def close(self) -> None:
        """Refuse new calls, end the running ones after a grace, remove the socket; idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        await self._health.enter_graceful_shutdown()
        await server.stop(STOP_GRACE_S)
        socket_path.release(self.path)

    async def __aenter__(self) -> ControlServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
