"""The page server over grpcio: one address for one catalogue, with health and reflection beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from postcopyd._native.image import REQUEST_MAX
from postcopyd.arguments import parse_endpoint
from postcopyd.errors import Code, ConfigError

from .catalog import Catalog
from .options import ServerOptions, TlsFiles
from .service import PageSourceService
from .servicer import SERVICE, PageSourceServicer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .image import ImageSpec

log = structlog.get_logger(__name__)

# Beyond the streams: Describe, Holes, Complete and health of as many clients.
CALLS_PER_STREAM = 4
STOP_GRACE_S = 2.0


class PageServer:
    """A server that listens. `address` is HOST:PORT with the port that was bound."""

    def __init__(
        self, service: PageSourceService, server: grpc.aio.Server, health_servicer: health.aio.HealthServicer
    ) -> None:
        self.service = service
        self.catalog = service.catalog
        self.address = ""
        self._server = server
        self._health = health_servicer

    async def start(self, listen: str, tls: TlsFiles | None) -> None:
        """Bind and serve.

        Raises:
            ConfigError: the address cannot be bound, or a certificate cannot be read.
        """
        host, _ = parse_endpoint(listen, port_zero=True)
        try:
            if tls is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, _credentials(tls))
        except RuntimeError as error:
            raise ConfigError(Code.ARGUMENT_INVALID, f"cannot listen on {listen}: {error}") from error
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("source.listening", address=self.address, images=[image.id for image in self.catalog])

    async def wait_released(self) -> None:
        """Return when every image was released."""
        await self.catalog.all_released.wait()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Let calls end within `grace_s`, then cancel them, and close the images. Idempotent."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        self.service.close()
        self.catalog.close()


async def serve(images: Iterable[ImageSpec], listen: str, options: ServerOptions | None = None) -> PageServer:
    """Open the images and serve them on `listen`, HOST:PORT; port 0: any.

    Raises:
        ConfigError: an image cannot be opened, or the address cannot be bound.
    """
    options = options or ServerOptions()
    service = PageSourceService(Catalog(images, keep=options.keep), options)
    server = grpc.aio.server(
        maximum_concurrent_rpcs=CALLS_PER_STREAM * options.max_streams, options=_channel_options(options)
    )
    health_servicer = health.aio.HealthServicer()
    server.add_generic_rpc_handlers((PageSourceServicer(service).handlers(),))
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    page_server = PageServer(service, server, health_servicer)
    try:
        await page_server.start(listen, options.tls)
    except ConfigError:
        await page_server.stop(0)
        raise
    return page_server


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
