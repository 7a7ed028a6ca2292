"""One VM from hand-off to completion: the only place where its parts are wired together.

A session owns its descriptors (userfaultfd, state memory, the VMM's socket and pidfd) and closes them once, at its
end. The userfaultfd is closed only when every page is settled and the memory is unregistered, or when the VMM's address
space is gone: closed earlier, absent pages would read as zero.

Longer than other modules: what a session does about each event stands in one place, so that it can be judged as a whole.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import time
from typing import TYPE_CHECKING

import msgspec
import structlog

from .attachment import SOCKET, STATE, Attachment, Phase
from .crash import crash_point
from .demux import Demultiplexer
from .errors import Code, HandoffError, KernelError, MigrationError, PostcopyError, SourceError
from .exit_socket import exits_of
from .fetcher import Fetcher
from .handoff.descriptors import OwnedFd
from .installer import Installer
from .memory import Memory
from .pager import Signal, probe_registered
from .status import NEXT_STATES, Limits, MigrationSpec, MigrationStatus, OnLoss, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from .exit_socket import ExitSocket
    from .handoff.offer import Handoff
    from .pacing import Shares
    from .state_memory import StateMemory
    from .store import DescriptorStore
    from .transport import ImageInfo, TransportFactory

log = structlog.get_logger(__name__)

COMPLETE_TRIES = 3
GONE_PROBE_S = 0.05
GONE_PROBES = 100
LET_GO_FIRST_S = 0.0005
LET_GO_MAX_S = 0.1


class Session:
    """A migration.

    Args:
        spec: as prepared; `image` is what its source described.
        changed: called whenever the status may have changed; must be quick.
        ended: called when the guest needs nothing more, or is gone, before the store forgets the session.
        present: a bit for each 4 KiB page of the image that the VMM has already.
        mark: of the state memory that a VMM must present, if an earlier daemon served it; see Memory.of_handoff.
    """

    def __init__(
        self,
        spec: MigrationSpec,
        image: ImageInfo,
        factory: TransportFactory,
        *,
        changed: Callable[[], None],
        ended: Callable[[], None],
        silent_after_s: float,
        store: DescriptorStore,
        shares: Shares,
        mark: int | None = None,
        present: bytes = b"",
    ) -> None:
        self.spec = spec
        self.image = image
        self._factory = factory
        self._changed = changed
        self._ended_before_store = ended
        self._mark = mark
        self._present = present
        self._silent_after_s = silent_after_s
        self._store = store
        self._shares = shares
        self._log = log.bind(migration=spec.id)
        self._state = State.PREPARED
        self._limits = spec.limits
        self._error: PostcopyError | None = None
        self._memory: Memory | None = None
        self._fetcher: Fetcher | None = None
        self._demux: Demultiplexer | None = None
        self._exits: ExitSocket | None = None
        self._end: asyncio.Future[State] | None = None
        self._source_in_use = ""
        self._transport = ""
        self._reconnects = 0
        self._patience: asyncio.TimerHandle | None = None
        self._memory_short = False
        self._source_released = False
        self._began = self._ended = time.monotonic()
        self._cancelling = False
        self._broken = False
        self._poisoned = False
        self._given_up: SourceError | None = None

    @property
    def state(self) -> State:
        return self._state

    @property
    def is_vacant(self) -> bool:
        """Whether a VMM may hand over."""
        return self._state is State.PREPARED and self._memory is None

    # -- hand-off

    @property
    def holds_memory(self) -> bool:
        return self._memory is not None and not self._memory.is_closed

    def is_of(self, handoff: Handoff) -> bool:
        """Whether `handoff` presents the memory that is served here, by the same VMM."""
        memory = self._memory
        return memory is not None and not self._state.is_final and memory.vmm.is_of(handoff)

    @property
    def mark(self) -> int:
        """Of the state memory in use, 0 without one."""
        return 0 if self._memory is None else self._memory.record.mark

    @property
    def vmm_pid(self) -> int:
        return 0 if self._memory is None else self._memory.record.vmm_pid

    async def take(self, handoff: Handoff, socket_path: str) -> None:
        """Take over a VMM's memory: check it against the image and the kernel, make the ledger, have all of it kept.

        On return the descriptors are the session's and the store holds them; `serve` acknowledges them.

        Raises:
            HandoffError: BUSY, STORE_FULL, or as Memory.of_handoff; KernelError: the store does not answer;
                OSError: no memory or descriptor. `handoff` stays the caller's then.
        """
        if not self.is_vacant:
            raise self._busy()
        memory = Memory.of_handoff(handoff, self.spec, self.image, socket_path, self._mark, self._present)
        crash_point("handoff.before_store")
        self._memory = memory
        try:
            await self._store.put(self.spec.id, memory.descriptors())
        except BaseException:
            self._memory = None
            await self._unstore(memory)
            memory.let_go()
            raise
        memory.note(phase=Phase.HELD)
        self._begin(memory, "handoff.accepted")

    async def take_again(self, handoff: Handoff) -> None:
        """The VMM lost its connection, or an answer, and presents the same memory: go on, and answer there.

        Raises:
            HandoffError: BUSY: it is another VMM, or other memory. `handoff` stays the caller's then.
            KernelError: the store does not answer.
        """
        memory = self._memory
        # Faults that were forwarded at the former socket could not be answered at the new one.
        if memory is None or not self.is_of(handoff) or memory.record.exits is not None:
            raise self._busy()
        await self._store.remove(self.spec.id, [SOCKET])
        sock = handoff.take_socket()
        memory.vmm.replace_socket(sock)
        await self._store.put(self.spec.id, {SOCKET: sock.fileno()})
        memory.note(keep_state=handoff.message.keep_state)
        # What came with it, we have.
        handoff.close()
        self._log.info("handoff.again", vmm_pid=memory.record.vmm_pid)
        await self._acknowledge()

    def _busy(self) -> HandoffError:
        return HandoffError(
            Code.HANDOFF_BUSY, f"migration {self.spec.id!r} has a VMM already; prepare one for each VMM"
        )

    def adopt(self, vmm: Attachment, state: StateMemory) -> None:
        """Go on with a session of an earlier process. Raises InvariantError: its state memory is unusable."""
        memory = Memory.adopted(vmm, state)
        memory.note(phase=Phase.HELD)
        self._memory = memory
        crash_point("adopt.woken")
        self._begin(memory, "session.adopted")

    def _begin(self, memory: Memory, event: str) -> None:
        record = memory.record
        self._began = time.monotonic() - max(0.0, time.time() - record.began_at)
        self._enter(State.CONNECTED)
        self._log.info(
            event,
            format=record.format_name,
            vmm_pid=record.vmm_pid,
            regions=len(record.regions),
            memory_bytes=record.memory_bytes,
        )

    async def _unstore(self, memory: Memory) -> None:
        """The state goes last, so that whoever finds leftovers can tell what they are."""
        kinds = [*memory.vmm.descriptors(), STATE]
        try:
            await self._store.remove(self.spec.id, kinds)
        except KernelError as error:
            self._log.error("store.not_emptied", code=error.code, error=str(error))

    # -- serving

    async def serve(self) -> None:
        """Serve the VMM that `take` took, until the guest needs nothing more or is gone."""
        memory = self._memory
        assert memory is not None
        self._end = asyncio.get_running_loop().create_future()
        self._demux = Demultiplexer(memory.pager, memory.uffd, self, memory.vmm.doorbell_fileno)
        share = self._shares.join(self._limits.weight)
        self._fetcher = Fetcher(
            memory.pager,
            self.image,
            self.spec.sources,
            self._factory,
            self,
            run_align=max(region.page_size for region in memory.record.regions),
            limits=self._limits,
            share=share,
            silent_after_s=self._silent_after_s,
        )
        installer = Installer(
            memory.pager, self._demux.dispatch, self._demux.drain, self._fetcher.on_answered
        )
        try:
            async with asyncio.TaskGroup() as group:
                fetching = group.create_task(self._fetcher.run(installer))
                watching = group.create_task(self._watch_vmm())
                self._demux.start()
                self._exits = exits_of(memory, self)
                if self._exits is not None:
                    self._exits.start()
                if not memory.record.acknowledged:
                    group.create_task(self._acknowledge())
                end = await self._until_settled()
                if end is State.COMPLETE:
                    await self._tell_source()
                watching.cancel()
                fetching.cancel()
        finally:
            share.leave()
            installer.close()
            self._demux.stop()
            if self._exits is not None:
                self._exits.stop()
            self._demux = self._fetcher = None
            if self._end.done():
                await self._close(memory, self._end.result())

    async def _acknowledge(self) -> None:
        """Once the store holds everything: the VMM may rely on it. Dying behind it says it twice, which is harmless."""
        memory = self._memory
        assert memory is not None
        crash_point("handoff.before_ack")
        try:
            if memory.record.keep_state:
                with OwnedFd(memory.state.open_read_only()) as kept:
                    await memory.vmm.acknowledge([kept.fileno()])
            else:
                await memory.vmm.acknowledge()
        except HandoffError as error:
            # It is served all the same: a VMM that is gone is found by its pidfd.
            self._log.warning("handoff.not_acknowledged", code=error.code, error=error.message)
            return
        crash_point("handoff.acknowledged")
        memory.note(acknowledged=True)

    async def _until_settled(self) -> State:
        """Wait for the end; a completion counts only if nothing new came with a last drain."""
        assert self._demux is not None
        while True:
            assert self._end is not None
            end = await asyncio.shield(self._end)
            if end is not State.COMPLETE:
                return end
            self._end = asyncio.get_running_loop().create_future()
            self._demux.drain()
            if self._end.done():
                return self._end.result()

    async def _tell_source(self) -> None:
        """Let the source go. The guest has its memory whatever comes of it."""
        assert self._fetcher is not None
        assert self._memory is not None
        stats = self._memory.pager.stats()
        for attempt in range(COMPLETE_TRIES):
            try:
                self._source_released = await self._fetcher.complete(stats.present + stats.zero, stats.zero)
                crash_point("complete.told")
                return
            except SourceError as error:
                self._log.warning("source.not_told", error=str(error), attempt=attempt + 1)
                await asyncio.sleep(0.2 * (attempt + 1))

    async def _watch_vmm(self) -> None:
        """Wait for the process that handed over to end, then for its address space to be gone."""
        assert self._memory is not None
        memory = self._memory
        if self._exits is not None and memory.vmm.pidfd is None:
            await self._exits.closed.wait()
        else:
            await memory.vmm.wait_gone()
        # Who handed over may have been a helper of the VMM: only the kernel knows whether the memory is gone.
        for _ in range(GONE_PROBES):
            try:
                probe_registered(memory.uffd, memory.record.regions[0])
            except KernelError as error:
                if error.errno == errno.ESRCH:
                    self.on_vmm_gone()
                    return
            await asyncio.sleep(GONE_PROBE_S)
        self._log.warning("vmm.peer_gone", detail="its memory lives on in another process; serving it")

    # -- what the demultiplexer reports

    def on_requests_waiting(self) -> None:
        if self._fetcher is not None:
            self._fetcher.pump_demand()

    def on_memory_short(self, short: bool) -> None:
        if short and not self._memory_short:
            self._log.error("memory.short", detail="vCPUs stay parked until memory or huge pages are free")
        elif self._memory_short and not short:
            self._log.info("memory.back")
        self._memory_short = short
        if self._fetcher is not None:
            self._fetcher.hold_push(short)

    def on_memory_trial(self) -> None:
        if self._fetcher is not None:
            self._fetcher.hold_push(False)

    def on_vmm_gone(self) -> None:
        if self._cancelling:
            self._finish(
                State.CANCELLED, MigrationError(Code.MIGRATION_CANCELLED, "cancelled; the VMM was ended")
            )
            return
        gone = HandoffError(
            Code.VMM_GONE, f"the VMM of migration {self.spec.id!r} ended before it had its memory"
        )
        self._finish(State.FAILED, self._given_up or gone)

    def on_kernel_failure(self, error: KernelError) -> None:
        # The descriptor must stay open, so the session stays; what failed is asked for again with every retry.
        if self._error is None:
            self._log.error("kernel.refused", code=error.code, error=str(error))
        self._error = error

    def on_distrust(self) -> None:
        if self._fetcher is not None:
            self._fetcher.distrust()

    def on_exits_broken(self, error: HandoffError) -> None:
        """Nothing from this VMM can be believed: it is not served on, and its memory stays absent until it ends."""
        self._log.error(str(error.code), code=error.code, error=str(error))
        self._error = error
        self._broken = True
        if self._exits is not None:
            self._exits.stop()
        if self._demux is not None:
            self._demux.stop()
        if self._fetcher is not None:
            self._fetcher.hold_push(True)
        self._enter(State.FAILED)

    def on_answers(self) -> None:
        if self._exits is not None:
            self._exits.answer()

    def on_exits_opened(self) -> None:
        assert self._memory is not None
        self._memory.arm()

    def dispatch(self, signals: int) -> None:
        """Act on what forwarded faults asked of the pager."""
        if self._demux is not None:
            self._demux.dispatch(signals)
        elif signals & Signal.ANSWERS:
            self.on_answers()

    def on_progress(self) -> None:
        if self._broken:
            return
        if self._memory is not None and self._memory.is_complete:
            self._finish(State.COMPLETE, None)
        self._changed()

    # -- what the fetcher reports

    @property
    def _is_decided(self) -> bool:
        """How it ends is known; what the source still does changes neither that nor its reason."""
        return self._end is not None and self._end.done() and self._end.result() is not State.COMPLETE

    def on_source_up(self, target: str, transport: str) -> None:
        if self._is_decided:
            return
        self._source_in_use, self._transport = target, transport
        self._error = None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        self._log.info("source.connected", source=target, transport=transport)
        self._enter(State.RUNNING)

    def on_source_ready(self) -> None:
        if self._demux is not None and self._fetcher is not None and self._memory is not None:
            self._demux.dispatch(self._memory.pager.retry())
            self._fetcher.pump_demand()
            self._fetcher.pump_push()

    def on_source_lost(self, error: SourceError) -> None:
        if self._is_decided:
            return
        self._reconnects += 1
        self._source_in_use = ""
        self._error = error
        self._log.error("source.lost", code=error.code, error=str(error), reconnects=self._reconnects)
        self._enter(State.RECOVERING)
        self._changed()  # the reason, even if the state is the same
        if self._patience is None and self.spec.retry_for_s:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(self.spec.retry_for_s, self._give_up)

    def _give_up(self) -> None:
        """The source did not come back in time: what was agreed for that happens."""
        assert self._memory is not None
        policy = self.spec.on_loss
        self._log.error("source.given_up", policy=policy, after_s=self.spec.retry_for_s)
        error = SourceError(
            Code.SOURCE_GIVEN_UP,
            f"no page source of migration {self.spec.id!r} came back within {self.spec.retry_for_s:g} s: {policy}",
        )
        self._error = error
        if policy is OnLoss.POISON and self._memory.pager.poison_missing():
            self._poisoned = True
            self._finish(State.FAILED, error)
        elif policy is OnLoss.KILL and self._memory.vmm.pidfd is not None:
            self._given_up = error
            signal.pidfd_send_signal(self._memory.vmm.pidfd.fileno(), signal.SIGKILL)
        elif policy is not OnLoss.HOLD:
            self._log.error("source.policy_impossible", policy=policy, detail="the guest waits on")
        self._changed()

    # -- control

    def set_limits(self, limits: Limits) -> None:
        self._limits = limits
        if self._memory is not None and not self._state.is_final:
            self._memory.note(spec=msgspec.structs.replace(self.spec, limits=limits))
        if self._fetcher is not None:
            self._fetcher.set_limits(limits)
        self._changed()

    def cancel(self, *, force: bool) -> None:
        """Before hand-off: end. After it, only with `force`, which kills the VMM; the end follows when it is gone.

        Raises:
            MigrationError: MIGRATION_UNFINISHED.
        """
        if self._state.is_final:
            return
        if self._memory is None:
            self._error = MigrationError(Code.MIGRATION_CANCELLED, "cancelled before a VMM connected")
            self._enter(State.CANCELLED)
            return
        pidfd = self._memory.vmm.pidfd
        if not force or pidfd is None:
            why = "its VMM's process is not known, end it by hand" if force else "use --force to end its VMM"
            raise MigrationError(
                Code.MIGRATION_UNFINISHED, f"the guest of {self.spec.id!r} still needs pages; {why}"
            )
        self._cancelling = True
        signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)

    def fail(self, error: PostcopyError) -> None:
        """The migration cannot begin, or cannot go on; what it holds stays open."""
        self._error = error
        self._enter(State.FAILED)

    # -- the end

    def _finish(self, state: State, error: PostcopyError | None) -> None:
        if self._end is not None and not self._end.done():
            self._error = error
            self._end.set_result(state)

    async def _close(self, memory: Memory, end: State) -> None:
        """Let the memory go. Never called without an end: then the descriptors stay open to the last."""
        if self._patience is not None:
            self._patience.cancel()
        if end is State.COMPLETE or self._poisoned:
            crash_point("complete.before_release")
            try:
                memory.pager.release()
            except KernelError as error:
                self._log.warning("kernel.refused", code=error.code, error=str(error))
            await self._let_go(memory)
            crash_point("complete.released")
            if self._exits is not None:
                self._exits.settle()
        self._ended = time.monotonic()
        memory.note(phase=Phase.ENDED)
        self._ended_before_store()
        await self._unstore(memory)
        if self._exits is not None and self._exits.is_settled:
            memory.vmm.take_socket()
        memory.close()
        self._enter(end)
        self._log.info("migration.ended", state=end, error=str(self._error or ""))

    async def _let_go(self, memory: Memory) -> None:
        """Return when no thread of the VMM waits, or is about to wait, for its madvise to be noticed."""
        delay_s = LET_GO_FIRST_S
        while not memory.pager.let_go():
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LET_GO_MAX_S)

    def _enter(self, state: State) -> None:
        if state is self._state:
            return
        if state not in NEXT_STATES[self._state]:
            self._log.debug("state.ignored", state=self._state, wanted=state)
            return
        self._log.info("migration.state", state=state, before=self._state)
        self._state = state
        self._changed()

    # -- status

    def status(self, socket_path: str) -> MigrationStatus:
        """A snapshot; reads counters, changes nothing."""
        common = MigrationStatus(
            id=self.spec.id,
            state=self._state,
            socket_path=socket_path,
            sources=self.spec.sources,
            source_in_use=self._source_in_use,
            limits=self._limits,
            epoch=self.image.epoch,
            transport=self._transport,
            reconnects=self._reconnects,
            memory_short=self._memory_short,
            source_released=self._source_released,
            error_code=str(self._error.code) if self._error else "",
            error=self._error.message if self._error else "",
        )
        memory = self._memory
        if memory is None:
            return common
        return memory.status(common, (self._ended if memory.is_closed else time.monotonic()) - self._began)
