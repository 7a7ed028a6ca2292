"""Listens with grpcio; health and reflection beside the page service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from postcopyd._native.image import REQUEST_MAX
from postcopyd.arguments import parse_endpoint
from postcopyd.errors import Code, ConfigError

from .servicer import SERVICE, PageSourceServicer

if TYPE_CHECKING:
    from .options import ServerOptions, TlsFiles
    from .service import PageSourceService

# Beyond the streams: Describe, Holes, Complete and health of as many clients.
CALLS_PER_STREAM = 4


class GrpcioListener:
    """Serves one `PageSourceService`."""

    def __init__(self, service: PageSourceService) -> None:
        options = service.options
        self._tls = options.tls
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=CALLS_PER_STREAM * options.max_streams, options=_channel_options(options)
        )
        self._health = health.aio.HealthServicer()
        self._server.add_generic_rpc_handlers((PageSourceServicer(service).handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self, listen: str) -> int:
        """Serve on HOST:PORT and return the port that was bound.

        Raises:
            ConfigError: the address cannot be bound, or a certificate cannot be used.
        """
        parse_endpoint(listen, port_zero=True)
        credentials = _credentials(self._tls) if self._tls else None
        try:
            if credentials is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, credentials)
        except RuntimeError as error:
            raise ConfigError(Code.ARGUMENT_INVALID, f"cannot listen on {listen}: {error}") from error
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def stop(self, grace_s: float) -> None:
        """Let calls end within `grace_s`, then cancel them; idempotent."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _channel_options(options: ServerOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", REQUEST_MAX),
        ("grpc.max_send_message_length", options.max_message_bytes),
        # A port that is taken must be an error, not shared.
        ("grpc.so_reuseport", 0),
        # A destination may ping a stream that is idle, to notice a dead source early.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
        # And a destination that died without a word gives its streams back.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    pair = (_read(tls.key), _read(tls.cert))
    ca = _read(tls.ca) if tls.ca else None
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(Code.CONFIG_UNREADABLE, f"{path} cannot be read: {error.strerror}") from error
