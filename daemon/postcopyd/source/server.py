"""The page server: one listening address for one catalogue, whatever transport carries it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import structlog

from postcopyd.arguments import format_endpoint, parse_endpoint
from postcopyd.errors import ConfigError

from .catalog import Catalog
from .options import ServerOptions
from .service import PageSourceService

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .image import ImageSpec

log = structlog.get_logger(__name__)

STOP_GRACE_S = 2.0


class Listener(Protocol):
    """A transport's server of one `PageSourceService`."""

    async def start(self, listen: str) -> int:
        """Serve on HOST:PORT and return the port. Raises ConfigError."""

    async def stop(self, grace_s: float) -> None:
        """Let calls end within `grace_s`, then cancel them; idempotent."""


class PageServer:
    """A server that listens. `address` is HOST:PORT with the port that was bound."""

    def __init__(self, service: PageSourceService, listener: Listener, address: str) -> None:
        self.service = service
        self.catalog = service.catalog
        self.address = address
        self._listener = listener

    async def wait_released(self) -> None:
        """Return when every image was released."""
        await self.catalog.all_released.wait()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Let calls end within `grace_s`, then cancel them, and close the images. Idempotent."""
        await self._listener.stop(grace_s)
        self.service.close()
        self.catalog.close()


async def serve(images: Iterable[ImageSpec], listen: str, options: ServerOptions | None = None) -> PageServer:
    """Open the images and serve them on `listen`, HOST:PORT; port 0: any.

    Raises:
        ConfigError: an image cannot be opened, or the address cannot be bound.
    """
    options = options or ServerOptions()
    host, _ = parse_endpoint(listen, port_zero=True)
    service = PageSourceService(Catalog(images, keep=options.keep), options)
    try:
        listener = _make_listener(service)
        port = await listener.start(listen)
    except ConfigError:
        service.close()
        service.catalog.close()
        raise
    address = format_endpoint(host, port)
    log.info(
        "source.listening",
        address=address,
        transport=options.transport,
        images=[image.id for image in service.catalog],
    )
    return PageServer(service, listener, address)


def _make_listener(service: PageSourceService) -> Listener:
    # Imported when wanted: each brings tens of MiB or a C library of its own.
    if service.options.transport == "native":
        from .native_listener import NativeListener

        return NativeListener(service)
    from .grpcio_listener import GrpcioListener

    return GrpcioListener(service)
