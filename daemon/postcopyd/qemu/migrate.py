"""Moves a QEMU's guest: device state by QEMU itself, memory by postcopyd.

The order is what keeps the guest whole. Everything that can fail is done before the source's vCPUs stop: page server,
prepared migration, QEMU's own stream up to its last part. Then QEMU holds (pause-before-switchover), the memory is
handed over, and only if all of it is does QEMU go on. The daemon reads nothing of the source's memory before the
hand-off, and that cannot come before the source's vCPUs stand still, because the socket that the destination's shim
waits for appears only then.

Until QEMU is told to go on, whatever fails is undone and the source runs on. From then on QEMU's own word decides which
of the two has the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from ..control.client import ControlClient
from ..control.rpc_errors import rebuilt
from ..errors import Code, ConfigError, HandoffError, MigrationError, PostcopyError
from ..status import Limits, MigrationStatus, State
from .gate import open_gate
from .machine import examine
from .page_server import ServedFiles
from .plan import CAPABILITIES, BlockPlan, Plan, make_plan
from .qmp import Machine
from .report import Report, make_report

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger(__name__)

EVENTS = "events"
SWITCH_TIMEOUT_S = 60.0
"""For QEMU's own part: what is not shared memory, and the device state."""

CANCEL_TIMEOUT_S = 10.0
BANDWIDTH = 1 << 40
"""Of QEMU's own stream, bytes a second: the guest stands still while its last part is on its way."""

NOT_DONE = ("failed", "cancelled")
ENDED = ("completed", *NOT_DONE)


class MigrateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a guest is moved.

    sources: page servers that serve the source's RAM already; empty: one is started here. state_uri: where the device
    state goes, as QEMU's `migrate` takes it; empty: a UNIX socket of ours. present: a bit for each 4 KiB page that the
    destination has already.
    """

    source_qmp: str
    destination_qmp: str
    control: str
    id: str = ""
    sources: tuple[str, ...] = ()
    state_uri: str = ""
    push_rate: int | None = None
    present: bytes = b""
    keep_source: bool = False


class QemuMigration:
    """One migration; use as an async context manager, then `plan`, then `run`.

    `say` gets a line for people at each step, `observe` the status of each RAM file's migration while it lasts.
    """

    def __init__(
        self,
        options: MigrateOptions,
        say: Callable[[str], None] = lambda line: None,
        observe: Callable[[MigrationStatus], None] = lambda status: None,
    ) -> None:
        self._options = options
        self._say = say
        self._observe = observe
        self._stack = AsyncExitStack()
        self._prepared: list[str] = []
        self._server: ServedFiles | None = None
        self._incoming = False
        self._began_at = 0.0
        self._connected_at: dict[str, float] = {}

    async def __aenter__(self) -> QemuMigration:
        """Connect to both machines and to the daemon. Raises ConfigError."""
        o = self._options
        try:
            self._source = await self._stack.enter_async_context(
                await Machine.connect("source", o.source_qmp)
            )
            self._destination = await self._stack.enter_async_context(
                await Machine.connect("destination", o.destination_qmp)
            )
            self._client = await self._stack.enter_async_context(ControlClient(o.control))
            await self._client.list()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def plan(self) -> Plan:
        """Examine both machines; changes nothing. Raises MigrationError, ConfigError: it is not possible, and why."""
        self._facts = await examine(self._source)
        facts = await examine(self._destination)
        plan = make_plan(self._facts, facts, self._options.id, serves_here=not self._options.sources)
        if self._source.pid is None and not (self._options.state_uri and self._options.sources):
            raise ConfigError(
                Code.ARGUMENT_INVALID,
                "the source QEMU is on another host: name its page server with --source, and with --state-uri where its "
                "device state arrives here, as tcp:10.0.0.2:4444",
            )
        if self._options.present and len(plan.blocks) > 1:
            raise ConfigError(Code.ARGUMENT_INVALID, "--present goes with a guest whose RAM is one file")
        return plan

    @property
    def destination(self) -> Machine:
        return self._destination

    @property
    def page_server_pid(self) -> int:
        """Of the page server that was started here; 0: none."""
        return 0 if self._server is None else self._server.pid

    @property
    def source_vcpu_tids(self) -> tuple[int, ...]:
        """Threads of the source's vCPUs, once there is a plan."""
        return self._facts.vcpu_tids

    async def run(self, plan: Plan) -> Report:
        """Move the guest; returns when the destination has all its memory.

        Raises:
            PostcopyError: the message says which of the two machines has the guest.
        """
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="postcopyd-qemu-")))
        try:
            await self._make_ready(plan, folder)
            await self._begin(folder)
            await self._hand_over(plan)
        except PostcopyError as error:
            await self._undo(plan)
            raise self._named(error) from error
        except BaseException:
            await self._undo(plan)
            raise
        await self._go_on(plan)
        return await self._follow(plan)

    # -- before the switch-over

    async def _make_ready(self, plan: Plan, folder: Path) -> None:
        o = self._options
        sources, epoch = o.sources, None
        if not sources:
            self._server = ServedFiles([(b.migration, b.source_path) for b in plan.blocks], folder)
            await self._server.start()
            sources, epoch = (self._server.address,), self._server.epoch
            self._say(f"page server: {self._server.address}, pid {self._server.pid}")
        limits = None if o.push_rate is None else Limits(push_rate=o.push_rate)
        self._sockets: dict[str, str] = {}
        for block in plan.blocks:
            status = await self._client.prepare(
                block.migration, sources, limits=limits, epoch=epoch, present=o.present
            )
            self._prepared.append(block.migration)
            self._sockets[block.migration] = status.socket_path

    async def _begin(self, folder: Path) -> None:
        """Have QEMU move what it moves, up to the point where the source's vCPUs stand still."""
        uri = self._options.state_uri or f"unix:{folder / 'state.sock'}"
        for machine in (self._source, self._destination):
            wanted = (*CAPABILITIES, EVENTS) if machine is self._source else (CAPABILITIES[0], EVENTS)
            await _set_capabilities(machine, dict.fromkeys(wanted, True))
        await self._source.execute("migrate-set-parameters", **{"max-bandwidth": BANDWIDTH})
        self._incoming = True
        await self._destination.execute("migrate-incoming", uri=uri)
        self._began_at = time.monotonic()
        await self._source.execute("migrate", uri=uri)
        await self._source.until(
            lambda m: m.migration in ("pre-switchover", *ENDED), SWITCH_TIMEOUT_S, "stops its vCPUs"
        )
        if self._source.migration != "pre-switchover":
            raise await self._failure()
        self._say("source: stopped")

    async def _failure(self) -> MigrationError:
        detail = ""
        with contextlib.suppress(PostcopyError):
            answer = await self._source.execute("query-migrate")
            if isinstance(answer, dict):
                detail = str(answer.get("error-desc", ""))
        return MigrationError(
            Code.QEMU_MIGRATION_FAILED,
            f"QEMU's own migration {self._source.migration}{': ' if detail else ''}{detail}",
        )

    async def _hand_over(self, plan: Plan) -> None:
        """Return when the daemon has all of the memory. Raises MigrationError."""
        self._connected_at = await open_gate(self._client, plan.blocks, self._sockets, self._destination)
        self._say("destination: memory handed over")

    async def _undo(self, plan: Plan) -> None:
        """The destination, which has a part of the guest, ends; then the source goes on as if nothing had happened."""
        if self._incoming and not self._destination.is_gone:
            with contextlib.suppress(PostcopyError):
                await self._destination.execute("quit")
        for id in self._prepared:
            with contextlib.suppress(PostcopyError):
                await self._client.cancel(id, force=True)
        if not self._source.is_gone:
            with contextlib.suppress(PostcopyError):
                await self._release_source(plan)
        if self._server is not None:
            await self._server.end()

    async def _release_source(self, plan: Plan) -> None:
        await self._cancel_qemu()
        names = (*CAPABILITIES, EVENTS)
        before = {name: self._facts.capabilities.get(name, False) for name in names}
        await _set_capabilities(self._source, before)
        if plan.was_running:
            await self._source.execute("cont")

    async def _cancel_qemu(self) -> None:
        """End QEMU's own migration, whichever way it ends. Raises MigrationError: it does not."""
        if self._source.migration and self._source.migration not in ENDED:
            await self._source.execute("migrate_cancel")
            await self._source.until(
                lambda m: m.migration in ENDED, CANCEL_TIMEOUT_S, "lets its migration go"
            )

    def _named(self, error: PostcopyError) -> MigrationError:
        """The same, with what became of the guest."""
        if not self._source.is_gone:
            return MigrationError(error.code, f"{error.message}; the source goes on as before")
        # A destination that loses its source ends too, and may be noticed first.
        text = error.message
        if f"the {self._source.name} QEMU" not in text:
            text = self._source.gone(f"at the switch-over; {text}").message
        return MigrationError(Code.QEMU_GONE, f"{text}; the guest ended with it")

    # -- the switch-over

    async def _go_on(self, plan: Plan) -> None:
        """QEMU moves the device state. Returns when the destination has the guest, else the source has it."""
        source, destination = self._source, self._destination
        lost = await self._send_state()
        if lost is None and source.migration != "completed":
            failure = await self._failure()
            await self._undo(plan)
            raise self._named(failure)
        try:
            await destination.until(
                lambda m: m.migration in ENDED, SWITCH_TIMEOUT_S, "has loaded its device state"
            )
            if destination.migration != "completed":
                raise destination.gone("as it could not load the device state")
        except MigrationError as error:
            raise await self._after_lost_destination(plan, lost or error) from error
        self._say("destination: has the guest, its memory is still at the source")

    async def _send_state(self) -> MigrationError | None:
        """Return when the source has sent all, or given up; its end, if it ended on the way, is returned."""
        source = self._source
        try:
            await source.execute("migrate-continue", state="pre-switchover")
            await source.until(lambda m: m.migration in ENDED, SWITCH_TIMEOUT_S, "has sent its device state")
        except MigrationError as error:
            if not source.is_gone:
                # It may have come to its end in this very moment: only what it says after this counts.
                await self._cancel_qemu()
                return None
            log.warning("qemu.source_gone", detail="the destination may have its device state all the same")
            return error
        return None

    async def _after_lost_destination(self, plan: Plan, error: MigrationError) -> MigrationError:
        """It never ran, so the source is the guest still, if it is there."""
        if self._destination.resumed_at is None and not self._source.is_gone:
            await self._undo(plan)
            return self._named(error)
        # One that could not load the state says so before it ends.
        never_runs = self._destination.resumed_at is None and self._destination.migration in NOT_DONE
        if (never_runs or self._destination.is_gone) and self._server is not None:
            await self._server.end()
        text = f"{error.message}; neither machine runs the guest; the source's RAM file is untouched"
        return MigrationError(error.code, text)

    # -- after it

    async def _follow(self, plan: Plan) -> Report:
        keeping = None if self._server is None else asyncio.create_task(self._server.keep_running())
        try:
            statuses = await asyncio.gather(*(self._until_final(block) for block in plan.blocks))
        except BaseException:
            self._say(self._advice(plan))
            raise
        finally:
            if keeping is not None:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
        for status in statuses:
            if status.state is not State.COMPLETE:
                raise self._lost(status)
        if self._server is not None:
            await self._server.end()
        report = make_report(
            plan,
            statuses,
            stopped_at=self._source.stopped_at,
            resumed_at=self._destination.resumed_at,
            began_at=self._began_at,
            connected_at=self._connected_at,
        )
        await self._finish_source()
        return report

    async def _until_final(self, block: BlockPlan) -> MigrationStatus:
        async with aclosing(self._client.watch(block.migration, interval_s=0.1)) as states:
            async for status in states:
                self._observe(status)
        return status

    def _lost(self, status: MigrationStatus) -> PostcopyError:
        error = rebuilt(
            status.error_code or Code.VMM_GONE, status.error or f"{status.id} ended {status.state}"
        )
        place = "is gone too" if self._source.is_gone else "is paused, as it was at the switch-over"
        return HandoffError(
            error.code,
            f"{error.message}. The guest had gone on at the destination; the source {place}: `cont` there takes the "
            "guest up from the switch-over and loses what it did since",
        )

    def _advice(self, plan: Plan) -> str:
        """For whoever takes over when this process must end."""
        ids = " ".join(block.migration for block in plan.blocks)
        text = f"the guest runs at the destination, not all of its memory is there: follow with `postcopyd watch {ids}`"
        if self._server is None:
            return text
        return (
            f"{text}; until then the page server, pid {self._server.pid}, must live, or be started again as: "
            + (" ".join(self._server.command()))
        )

    async def _finish_source(self) -> None:
        if self._options.keep_source or self._source.is_gone:
            return
        try:
            await self._source.execute("quit")
        except MigrationError as error:
            log.warning("qemu.source_not_ended", code=error.code, error=error.message)


async def _set_capabilities(machine: Machine, states: dict[str, bool]) -> None:
    await machine.execute(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": state} for name, state in states.items()],
    )
