"""`postcopyd run`: puts the parts of the daemon together and holds them until it is stopped."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import structlog

from .errors import Code
from .health.readiness import Readiness
from .manager import Manager
from .metrics.counts import ErrorCounts
from .priority import raise_priority
from .sdnotify import Notifier, Watchdog, listen_fds
from .standby.claim import standby_path
from .store import DescriptorStore, group, offered_capacity
from .transport.factory import make_factory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .config import DaemonConfig
    from .control.server import ControlServer

log = structlog.get_logger(__name__)

SOCKET_NAME = "vmm"
"""FileDescriptorName of postcopyd.socket."""


class Daemon:
    """One daemon process.

    SIGTERM: with a descriptor store, end at once and let the next process go on. SIGINT, and SIGTERM without a store:
    end when no guest needs it any more.

    Args:
        arguments: of the command line, for a process that is to go on with the same.
    """

    def __init__(self, config: DaemonConfig, arguments: Sequence[str] = ()) -> None:
        self._config = config
        self._arguments = arguments
        self._notifier = Notifier.from_environ()
        self._readiness = Readiness()
        self._handoff_errors = ErrorCounts()
        self._store = DescriptorStore(self._notifier, config.store_max or offered_capacity())
        self._manager = Manager(
            config,
            make_factory(config),
            self._store,
            count_handoff_error=lambda code: self._handoff_errors.record(Code(code)),
        )
        self._stop_asked = asyncio.Event()
        self._hand_over = False

    async def run(self) -> None:
        """Raises ConfigError: a socket or an address cannot be had."""
        raise_priority(self._config.nice)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal, number)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._manager.close)
            stored, others = group(listen_fds())
            passed = others.pop(SOCKET_NAME, None)
            for name in others:
                log.warning("store.unknown", name=name, detail="kept open")
            # Guests that wait come first: what the rest needs takes longer to load than all that they need.
            await self._manager.adopt(stored)
            control = await self._start_control(stack)
            await self._start_http(stack)
            self._manager.prepare_again()
            if passed is not None:
                self._manager.take_default_socket(passed)
            elif self._config.default_socket:
                self._manager.listen_by_default(self._config.default_socket)
            await self._manager.wait_running()
            self._start_watchdog(stack)
            self._readiness.release("starting")
            await control.set_serving(True)
            self._notifier.notify(READY=1, STATUS="Ready")
            log.info("daemon.ready", control=self._config.control, transport=self._config.transport)
            await self._start_standby(stack)
            await self._stop_asked.wait()
            self._readiness.hold("stopping", "the daemon was asked to stop")
            await control.set_serving(False)
            await self._drain()
            self._notifier.notify(STOPPING=1)

    async def _start_control(self, stack: AsyncExitStack) -> ControlServer:
        await _load("postcopyd.control.server")
        from .control.server import ControlServer

        server = ControlServer(
            self._manager, self._config.control, default_limits=self._config.default_limits()
        )
        return await stack.enter_async_context(server)

    async def _start_http(self, stack: AsyncExitStack) -> None:
        if not self._config.http:
            return
        # aiohttp is a third of the daemon's memory: only those who ask for it pay.
        await _load("postcopyd.health.http")
        await _load("postcopyd.metrics.exposition")
        from .health.http import HttpServer
        from .metrics.collector import Snapshot, SnapshotCollector
        from .metrics.exposition import Exposition

        def collect() -> SnapshotCollector:
            return SnapshotCollector(Snapshot(self._manager.list(), self._handoff_errors.snapshot()))

        server = HttpServer(
            self._config.http, lambda: self._readiness.report(self._manager.list()), Exposition(collect)
        )
        await server.start()
        stack.push_async_callback(server.close)

    def _start_watchdog(self, stack: AsyncExitStack) -> None:
        watchdog = Watchdog.from_environ(self._notifier)
        if watchdog is None:
            return
        task = asyncio.ensure_future(watchdog.run())
        stack.callback(task.cancel)

    async def _start_standby(self, stack: AsyncExitStack) -> None:
        """Only now: what it loads would keep guests waiting."""
        if not self._config.standby:
            return
        if not self._store.is_durable or not standby_path(os.environ):
            log.warning("standby.off", detail="it needs a descriptor store and $RUNTIME_DIRECTORY")
            return
        from .standby.keeper import StandbyKeeper

        await stack.enter_async_context(StandbyKeeper(self._arguments))

    def _on_stop_signal(self, number: int) -> None:
        left = self._manager.unfinished()
        log.warning("daemon.stop_asked", signal=signal.Signals(number).name, unfinished=left)
        self._hand_over = number == signal.SIGTERM and self._store.is_durable
        self._stop_asked.set()

    async def _drain(self) -> None:
        """With a store another process goes on where this one ends. Without one absent pages could not come, and with
        its last descriptor closed they would read as zero: so it stays until every guest has its memory."""
        if self._hand_over:
            return
        if left := self._manager.unfinished():
            log.warning("daemon.draining", unfinished=left)
            self._notifier.notify(STATUS=f"Draining: {left} migrations are not complete")
        await self._manager.drain()


async def _load(name: str) -> None:
    """Import a module in a thread: the event loop gets its turns meanwhile, and guests their pages."""
    await asyncio.to_thread(importlib.import_module, name)


async def run_daemon(config: DaemonConfig, arguments: Sequence[str] = ()) -> None:
    """Run a daemon until it is stopped. Raises ConfigError."""
    await Daemon(config, arguments).run()
