"""`postcopyd serve`: the page server's command."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from typing import TYPE_CHECKING

import click
import uvloop

from postcopyd import log as logs
from postcopyd.errors import Code, ConfigError
from postcopyd.priority import NICE, raise_priority
from postcopyd.sdnotify import Notifier
from postcopyd.units import MIB, parse_size

from .image import parse_image
from .options import ServerOptions, TlsFiles
from .progress import Progress
from .server import PageServer
from .server import serve as start_server

if TYPE_CHECKING:
    from postcopyd.health.http import HttpServer

    from .image import ImageSpec
    from .options import Transport

PAGE_LIMITS = (4096, 64 * MIB)


@click.command()
@click.option(
    "--image",
    "images",
    multiple=True,
    required=True,
    metavar="ID=PATH[@EPOCH]",
    help="Serve a file as an image; repeatable.",
)
@click.option("--listen", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT")
@click.option("--once", is_flag=True, help="Exit when every image was released.")
@click.option("--keep", is_flag=True, help="Serve images on after Complete: a snapshot restored many times.")
@click.option(
    "--transport",
    type=click.Choice(["grpcio", "native"]),
    default="native",
    show_default=True,
    help="Implementation of gRPC; the wire is the same.",
)
@click.option("--max-streams", type=click.IntRange(1, 4096), default=64, show_default=True)
@click.option(
    "--max-message", default="1M", show_default=True, metavar="SIZE", help="Most data in a message."
)
@click.option(
    "--http",
    default="",
    metavar="HOST:PORT",
    help="Answer /healthz, /readyz and /metrics there; port 0: any.",
)
@click.option("--tls-cert", default="", metavar="FILE")
@click.option("--tls-key", default="", metavar="FILE")
@click.option("--tls-ca", default="", metavar="FILE", help="Clients must have a certificate of this CA.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
def serve(
    images: tuple[str, ...],
    listen: str,
    once: bool,
    keep: bool,
    transport: Transport,
    max_streams: int,
    max_message: str,
    http: str,
    tls_cert: str,
    tls_key: str,
    tls_ca: str,
    log_level: str,
) -> None:
    """Serve memory images to destinations.

    Prints one JSON object with the address that was bound when it listens. The files must not change while
    they are served. Without TLS the memory travels in the clear to whoever can connect.
    """
    logs.configure(log_level)
    if once and keep:
        raise ConfigError(Code.ARGUMENT_INVALID, "--once waits for releases, which --keep forbids; name one")
    options = ServerOptions(
        keep=keep,
        transport=transport,
        max_streams=max_streams,
        max_data_bytes=_check_message(max_message),
        tls=_check_tls(tls_cert, tls_key, tls_ca),
    )
    specs = [parse_image(text) for text in images]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_server(specs, listen, options, once=once, http=http))


async def run_server(
    specs: list[ImageSpec], listen: str, options: ServerOptions, *, once: bool, http: str = ""
) -> None:
    """Serve until SIGTERM, SIGINT or, if `once`, until every image was released.

    Args:
        http: HOST:PORT of the ops endpoint; empty: none.

    Raises:
        ConfigError: an image cannot be opened, or an address cannot be bound.
    """
    raise_priority(NICE)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    server = await start_server(specs, listen, options)
    notifier = Notifier.from_environ()
    ops = None
    try:
        listening = {"event": "source.listening", "address": server.address}
        if http:
            ops = await start_ops(http, server, stopped)
            listening["http"] = ops.address
        # Scripts wait for this line and read the ports from it.
        click.echo(json.dumps(listening))
        notifier.notify(READY=1, STATUS=f"Serving {len(specs)} images on {server.address}")
        await _serve_until(stopped, server, once=once)
    finally:
        notifier.notify(STOPPING=1)
        await server.stop()
        if ops is not None:
            await ops.close()


async def start_ops(endpoint: str, server: PageServer, stopped: asyncio.Event) -> HttpServer:
    """Raises ConfigError: the address cannot be bound."""
    # They cost memory, which only those pay who ask for them.
    from postcopyd.health.http import HttpServer
    from postcopyd.metrics.exposition import Exposition

    from .metrics import SourceCollector

    def report() -> dict[str, object]:
        images = {image.id: "released" if image.file.is_released else "served" for image in server.catalog}
        return {"ready": not stopped.is_set(), "images": images}

    ops = HttpServer(endpoint, report, Exposition(lambda: SourceCollector.of(server.service)))
    await ops.start()
    return ops


async def _serve_until(stopped: asyncio.Event, server: PageServer, *, once: bool) -> None:
    ends: list[asyncio.Task[object]] = [asyncio.create_task(stopped.wait())]
    if once:
        ends.append(asyncio.create_task(server.wait_released()))
    progress = asyncio.create_task(Progress(server.service).run())
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (*ends, progress):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await progress


def _check_message(text: str) -> int:
    size = parse_size(text)
    if not PAGE_LIMITS[0] <= size <= PAGE_LIMITS[1] or size % PAGE_LIMITS[0]:
        raise ConfigError(
            Code.ARGUMENT_INVALID, f"--max-message {text}: must be 4K to 64M and a multiple of 4096"
        )
    return size


def _check_tls(cert: str, key: str, ca: str) -> TlsFiles | None:
    if not cert and not key and not ca:
        return None
    if not cert or not key:
        raise ConfigError(Code.ARGUMENT_INVALID, "TLS needs both --tls-cert and --tls-key")
    return TlsFiles(cert=cert, key=key, ca=ca)
