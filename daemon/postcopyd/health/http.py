"""The HTTP endpoint of the daemon and of the page server: /healthz, /readyz and /metrics.

Without authentication, read-only, and on loopback unless configured otherwise. aiohttp is imported by
`start`, so that a process without this endpoint does not pay for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import structlog

from postcopyd.arguments import format_endpoint, parse_endpoint
from postcopyd.errors import Code, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp import web

    from postcopyd.metrics.exposition import Exposition

log = structlog.get_logger(__name__)

KEEPALIVE_S = 15.0
MAX_LINE_BYTES = 2048
BACKLOG = 16


class HttpServer:
    """Serves at `endpoint`, HOST:PORT; port 0 means any, and `port` tells which.

    Args:
        readiness: what /readyz answers; `ready` in it is a bool, which the status says too.
    """

    def __init__(
        self, endpoint: str, readiness: Callable[[], Mapping[str, object]], exposition: Exposition
    ) -> None:
        self._host, self.port = parse_endpoint(endpoint, port_zero=True)
        self._readiness = readiness
        self._exposition = exposition
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> str:
        """HOST:PORT, with the port that was bound."""
        return format_endpoint(self._host, self.port)

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address cannot be bound.
        """
        from aiohttp import web

        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            keepalive_timeout=KEEPALIVE_S,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self.port, backlog=BACKLOG).start()
        except OSError as error:
            await runner.cleanup()
            raise ConfigError(
                Code.CONFIG_INVALID, f"http: {self._host}:{self.port} cannot be bound: {error.strerror}"
            ) from error
        self._runner = runner
        self.port = runner.addresses[0][1]
        log.info("http.listening", host=self._host, port=self.port)

    async def close(self) -> None:
        """Stop; idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _healthz(self, request: web.Request) -> web.Response:
        """That this runs at all is the answer: the event loop turns."""
        return _json(200, {"status": "alive"})

    async def _readyz(self, request: web.Request) -> web.Response:
        body = self._readiness()
        return _json(200 if body["ready"] else 503, body)

    async def _metrics(self, request: web.Request) -> web.Response:
        from aiohttp import web

        body, content_type = await self._exposition.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})


def _json(status: int, body: object) -> web.Response:
    from aiohttp import web

    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json")
