"""The errors postcopyd can report, each with a stable code, whose fault it is, and an exit status.

`grpc` errors and `OSError` are mapped to these once, at the edge. The catalogue in docs/operations.md is generated
from `CATALOGUE`.
"""

from __future__ import annotations

import errno as errno_names
from enum import StrEnum
from typing import ClassVar

import msgspec


class Code(StrEnum):
    """Stable codes: log events, metrics, gRPC details and docs/operations.md use them."""

    CONFIG_UNREADABLE = "config.unreadable"
    CONFIG_INVALID = "config.invalid"
    ARGUMENT_INVALID = "argument.invalid"

    HANDOFF_NOT_JSON = "handoff.not_json"
    HANDOFF_TOO_LARGE = "handoff.too_large"
    HANDOFF_TRUNCATED = "handoff.truncated"
    HANDOFF_TIMEOUT = "handoff.timeout"
    HANDOFF_UNKNOWN_FORMAT = "handoff.unknown_format"
    HANDOFF_NO_DESCRIPTOR = "handoff.no_descriptor"
    HANDOFF_EXTRA_DESCRIPTORS = "handoff.extra_descriptors"
    HANDOFF_NOT_UFFD = "handoff.not_uffd"
    HANDOFF_BAD_REGION = "handoff.bad_region"
    HANDOFF_NOT_REGISTERED = "handoff.not_registered"
    HANDOFF_PAGE_SIZE = "handoff.page_size"
    HANDOFF_BEYOND_IMAGE = "handoff.beyond_image"
    HANDOFF_UNEXPECTED = "handoff.unexpected"
    HANDOFF_VERSION = "handoff.version"
    HANDOFF_BUSY = "handoff.busy"
    HANDOFF_NO_MIGRATION = "handoff.no_migration"
    HANDOFF_STALE_STATE = "handoff.stale_state"
    EXIT_RING_BROKEN = "exit_ring.broken"
    EXIT_SOCKET_BROKEN = "exit_socket.broken"
    EXIT_SOCKET_EXITLESS = "exit_socket.exitless"
    STORE_FULL = "store.full"
    STORE_INCOMPLETE = "store.incomplete"

    SOURCE_UNREACHABLE = "source.unreachable"
    SOURCE_UNKNOWN_IMAGE = "source.unknown_image"
    SOURCE_OTHER_EPOCH = "source.other_epoch"
    SOURCE_BAD_REPLY = "source.bad_reply"
    SOURCE_CLOSED = "source.closed"
    SOURCE_REFUSED = "source.refused"
    SOURCE_SILENT = "source.silent"
    SOURCE_GIVEN_UP = "source.given_up"
    SOURCE_BUSY = "source.busy"

    IMAGE_UNREADABLE = "image.unreadable"
    IMAGE_SHRANK = "image.shrank"

    VMM_GONE = "vmm.gone"
    VMM_HANDOFF_UNANSWERED = "vmm.handoff_unanswered"
    GUEST_NO_KVM = "guest.no_kvm"
    GUEST_STATE = "guest.state"
    GUEST_STATE_FILE = "guest.state_file"
    GUEST_COMMAND = "guest.command"
    KERNEL = "kernel.refused"
    MEMORY_SHORT = "memory.short"

    MIGRATION_EXISTS = "migration.exists"
    MIGRATION_UNKNOWN = "migration.unknown"
    MIGRATION_UNFINISHED = "migration.unfinished"
    MIGRATION_CANCELLED = "migration.cancelled"
    QEMU_UNREACHABLE = "qemu.unreachable"
    QEMU_REFUSED = "qemu.refused"
    QEMU_GONE = "qemu.gone"
    QEMU_UNSUITABLE = "qemu.unsuitable"
    QEMU_DIFFERENT = "qemu.different"
    QEMU_STATE = "qemu.state"
    QEMU_NO_SHIM = "qemu.no_shim"
    QEMU_MIGRATION_FAILED = "qemu.migration_failed"
    CONTROL_UNREACHABLE = "control.unreachable"
    DEMO_FAILED = "demo.failed"
    INVARIANT = "internal.invariant"


class PostcopyError(Exception):
    """Base of all errors that postcopyd names.

    Args:
        code: what went wrong.
        message: one sentence for the operator, with what to do about it.
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class ConfigError(PostcopyError):
    """The operator's: configuration or command line."""

    exit_status = 2


class HandoffError(PostcopyError):
    """The VMM's: what it handed over cannot be served."""

    exit_status = 3


class SourceError(PostcopyError):
    """The page source's: unreachable, refused, or its answers are wrong."""

    exit_status = 4


class KernelError(PostcopyError):
    """The kernel's answer that no policy expects."""

    exit_status = 5

    def __init__(self, op: str, addr: int, len_bytes: int, errno: int) -> None:
        name = errno_names.errorcode.get(errno, str(errno))
        super().__init__(
            Code.KERNEL, f"{op} of {len_bytes} bytes at {addr:#x} was refused by the kernel: {name}"
        )
        self.op = op
        self.addr = addr
        self.len_bytes = len_bytes
        self.errno = errno


class MigrationError(PostcopyError):
    """A migration does not exist, exists already, or is in a state that does not allow what was asked."""

    exit_status = 6


class InvariantError(PostcopyError):
    """Ours: a promise of this code was broken."""

    exit_status = 70

    def __init__(self, message: str) -> None:
        super().__init__(Code.INVARIANT, message)


class Entry(msgspec.Struct, frozen=True):
    """What an operator needs to know about a code."""

    error: type[PostcopyError]
    meaning: str
    action: str


CATALOGUE: dict[Code, Entry] = {
    Code.CONFIG_UNREADABLE: Entry(
        ConfigError, "The configuration file cannot be read.", "Check path and permissions."
    ),
    Code.CONFIG_INVALID: Entry(
        ConfigError,
        "The configuration is not valid TOML, has an unknown key, or a value of the wrong type.",
        "The message names the key; docs/operations.md lists all keys.",
    ),
    Code.ARGUMENT_INVALID: Entry(
        ConfigError, "A command-line argument makes no sense.", "The message says which, and what is allowed."
    ),
    Code.HANDOFF_NOT_JSON: Entry(
        HandoffError,
        "The VMM's hand-off is not JSON of a known shape.",
        "Check that the VMM's format is supported.",
    ),
    Code.HANDOFF_TOO_LARGE: Entry(
        HandoffError,
        "The hand-off is longer than 64 KiB.",
        "A hand-off of a sane number of regions is far shorter.",
    ),
    Code.HANDOFF_TRUNCATED: Entry(
        HandoffError,
        "The VMM closed its socket, or the kernel cut the message, before the hand-off was whole.",
        "Look into the VMM's log: it probably died.",
    ),
    Code.HANDOFF_TIMEOUT: Entry(
        HandoffError, "The VMM connected but did not hand over in time.", "Look into the VMM's log."
    ),
    Code.HANDOFF_UNKNOWN_FORMAT: Entry(
        HandoffError,
        "The first bytes belong to no known hand-off format.",
        "Check what connected to the socket.",
    ),
    Code.HANDOFF_NO_DESCRIPTOR: Entry(
        HandoffError, "No userfaultfd came with the hand-off.", "The VMM must send it with SCM_RIGHTS."
    ),
    Code.HANDOFF_EXTRA_DESCRIPTORS: Entry(
        HandoffError,
        "More descriptors came than the format names.",
        "The VMM speaks another format or version.",
    ),
    Code.HANDOFF_NOT_UFFD: Entry(
        HandoffError, "The descriptor handed over is no userfaultfd.", "Check the VMM's order of descriptors."
    ),
    Code.HANDOFF_BAD_REGION: Entry(
        HandoffError,
        "A region is empty, unaligned, overlaps another, or overflows.",
        "The message names the region; this is a bug of the VMM.",
    ),
    Code.HANDOFF_NOT_REGISTERED: Entry(
        HandoffError,
        "A region is not registered with the userfaultfd that was handed over.",
        "The VMM must register its memory (MISSING) before it hands over.",
    ),
    Code.HANDOFF_PAGE_SIZE: Entry(
        HandoffError,
        "The page size is neither 4 KiB, 2 MiB nor 1 GiB.",
        "Check the VMM's huge page settings.",
    ),
    Code.HANDOFF_BEYOND_IMAGE: Entry(
        HandoffError,
        "The VMM has memory that the image at the source does not have.",
        "The VMM was started with other memory settings than the source, or with another image.",
    ),
    Code.HANDOFF_UNEXPECTED: Entry(
        HandoffError,
        "The VMM sent something after its hand-off that the format does not know.",
        "The VMM speaks a newer version.",
    ),
    Code.HANDOFF_VERSION: Entry(
        HandoffError,
        "The VMM speaks a version of the framed hand-off that this postcopyd does not.",
        "Upgrade whichever of the two is older; the message names both versions.",
    ),
    Code.HANDOFF_BUSY: Entry(
        HandoffError,
        "A second VMM connected to a migration that has one.",
        "Prepare a migration for each VMM.",
    ),
    Code.HANDOFF_NO_MIGRATION: Entry(
        HandoffError,
        "A VMM connected to the default socket, and it is not clear for which migration.",
        "Prepare exactly one, name a default source in the configuration, or use the socket that `prepare` printed.",
    ),
    Code.HANDOFF_STALE_STATE: Entry(
        HandoffError,
        "A VMM came back after the end of a daemon, without the state memory that it was given last, or with another.",
        "Without it the pages that the guest gave back are not known, so it is not served: end that VMM, cancel the "
        "migration, and begin again.",
    ),
    Code.EXIT_RING_BROKEN: Entry(
        HandoffError,
        "The exit ring that a VMM shares breaks its rules: size, seals, indices, addresses.",
        "A bug of the VMM, or a VMM taken over by its guest: end it. Its vCPUs wait until then; no other VM is touched.",
    ),
    Code.EXIT_SOCKET_BROKEN: Entry(
        HandoffError,
        "What a VMM forwards of its vCPUs' faults over its socket breaks the rules: frames, addresses, amounts.",
        "A bug of the VMM, or a VMM taken over by its guest: end it. Its vCPUs wait until then; no other VM is touched.",
    ),
    Code.EXIT_SOCKET_EXITLESS: Entry(
        HandoffError,
        "A Firecracker wants its vCPUs' faults served by eventfds (exitless_apf), which postcopyd does not do.",
        "Start it without exitless asynchronous page faults; it then forwards the faults over its socket.",
    ),
    Code.STORE_FULL: Entry(
        HandoffError,
        "The service manager's descriptor store has no room for another VMM's descriptors.",
        "Raise FileDescriptorStoreMax in the unit and store_max in the configuration; cancel what is not needed.",
    ),
    Code.STORE_INCOMPLETE: Entry(
        InvariantError,
        "Descriptors of a session came back from the store, but not enough of them to serve it.",
        "They are kept open so that its guest waits and reads no zeros; end that VMM by hand.",
    ),
    Code.SOURCE_UNREACHABLE: Entry(
        SourceError,
        "No page source answers.",
        "Check the source host, its `postcopyd serve`, and the network.",
    ),
    Code.SOURCE_UNKNOWN_IMAGE: Entry(
        SourceError, "The page source has no image of this id.", "Check `--image` of `postcopyd serve`."
    ),
    Code.SOURCE_OTHER_EPOCH: Entry(
        SourceError,
        "The page source serves other content under this id than the migration began with.",
        "Serve the original image again; the guest waits. Pages of another image are never installed.",
    ),
    Code.SOURCE_BAD_REPLY: Entry(
        SourceError,
        "A reply was not asked for, has a wrong length, or its checksum does not match; it was dropped and asked again.",
        "If it repeats: faulty memory or network on the way, or a source of another version.",
    ),
    Code.SOURCE_CLOSED: Entry(
        SourceError, "The page source closed the stream.", "It was stopped or crashed; postcopyd reconnects."
    ),
    Code.SOURCE_REFUSED: Entry(
        SourceError, "The page source refused a request.", "The message carries its reason."
    ),
    Code.SOURCE_SILENT: Entry(
        SourceError, "The page source did not answer in time.", "Check the network; postcopyd reconnects."
    ),
    Code.SOURCE_BUSY: Entry(
        SourceError,
        "The page source serves as many streams as it may.",
        "Raise `--max-streams` of `postcopyd serve`, or find out who holds the others.",
    ),
    Code.SOURCE_GIVEN_UP: Entry(
        SourceError,
        "No page source came back within --retry-for, and what --on-loss says was done.",
        "hold: bring a source back, the guest still waits. poison, kill: the guest's missing memory is lost.",
    ),
    Code.IMAGE_UNREADABLE: Entry(
        ConfigError, "An image's file cannot be opened or read.", "Check path, permissions and size."
    ),
    Code.IMAGE_SHRANK: Entry(
        SourceError,
        "An image's file became shorter while it was served.",
        "Something writes to the image; what was cut off is lost unless the file is restored.",
    ),
    Code.VMM_GONE: Entry(HandoffError, "The VMM's process ended.", "Look into the VMM's log."),
    Code.VMM_HANDOFF_UNANSWERED: Entry(
        HandoffError,
        "The VMM could not hand its memory over: no daemon listens, or it did not acknowledge.",
        "Check that `postcopyd run` is up and that the migration is prepared; its log says what it refused.",
    ),
    Code.GUEST_NO_KVM: Entry(
        ConfigError,
        "The demo guest needs /dev/kvm, which is missing or not permitted.",
        "Load the kvm module, join the kvm group, or use `--guest process`.",
    ),
    Code.GUEST_STATE: Entry(
        MigrationError,
        "The demo VMM was asked for something that its guest's state does not allow.",
        "The message says which state is needed.",
    ),
    Code.GUEST_STATE_FILE: Entry(
        ConfigError,
        "A saved guest state cannot be read or written, or is of another guest.",
        "Use the file that the source's `save` wrote, and the same memory size, vCPUs, order and seed.",
    ),
    Code.GUEST_COMMAND: Entry(
        ConfigError,
        "A line on the demo VMM's input is no command it knows.",
        "The message says what is wrong.",
    ),
    Code.KERNEL: Entry(
        KernelError,
        "The kernel refused an operation in a way that no policy expects.",
        "Report it with the log.",
    ),
    Code.MEMORY_SHORT: Entry(
        KernelError,
        "No memory or no huge page is free to install pages; the vCPUs stay parked and postcopyd tries again.",
        "Free memory or raise vm.nr_hugepages.",
    ),
    Code.MIGRATION_EXISTS: Entry(
        MigrationError,
        "A migration of this id, or at this socket, exists.",
        "Cancel it or choose another id.",
    ),
    Code.MIGRATION_UNKNOWN: Entry(
        MigrationError, "There is no migration of this id.", "`postcopyd list` shows those there are."
    ),
    Code.MIGRATION_UNFINISHED: Entry(
        MigrationError,
        "The guest still needs pages, so the migration cannot be let go.",
        "Wait for completion; `cancel --force` ends the VMM with it.",
    ),
    Code.MIGRATION_CANCELLED: Entry(MigrationError, "The migration was cancelled.", "None."),
    Code.QEMU_UNREACHABLE: Entry(
        ConfigError,
        "No QEMU answers at the monitor socket that was named.",
        "Check `-qmp unix:PATH,server,nowait` and who else is connected: a monitor serves one client at a time.",
    ),
    Code.QEMU_REFUSED: Entry(
        MigrationError,
        "QEMU refused a command, or answered it in an unknown way.",
        "The message carries its reason.",
    ),
    Code.QEMU_GONE: Entry(
        MigrationError,
        "A QEMU ended, or stopped answering, in the middle of a migration.",
        "The message says which and when, and what became of the other. Look into its log.",
    ),
    Code.QEMU_UNSUITABLE: Entry(
        MigrationError,
        "A QEMU cannot take part: its RAM is not in shared files, or something forbids its guest to move.",
        "Start it as docs/qemu.md shows; the message says what is missing.",
    ),
    Code.QEMU_DIFFERENT: Entry(
        MigrationError,
        "The two machines are not the same: type, RAM, number of vCPUs.",
        "Start the destination with the source's command line, but for its RAM file and -incoming defer.",
    ),
    Code.QEMU_STATE: Entry(
        MigrationError,
        "A QEMU is in a state in which its guest cannot move, or cannot arrive.",
        "The source must be running or paused, the destination started with -incoming defer.",
    ),
    Code.QEMU_NO_SHIM: Entry(
        MigrationError,
        "The destination QEMU does not wait for its pages.",
        "Preload libpostcopy-preload.so with POSTCOPYD_RAM, POSTCOPYD_SOCKET and POSTCOPYD_WAIT=1.",
    ),
    Code.QEMU_MIGRATION_FAILED: Entry(
        MigrationError,
        "QEMU's own migration of the device state failed.",
        "The message says which of the two machines has the guest now.",
    ),
    Code.CONTROL_UNREACHABLE: Entry(
        ConfigError,
        "No postcopyd answers on the control socket.",
        "Start `postcopyd run`, or name its socket with --control.",
    ),
    Code.DEMO_FAILED: Entry(
        MigrationError, "One of the demo's processes failed.", "The message carries the end of its log."
    ),
    Code.INVARIANT: Entry(
        InvariantError, "A promise of postcopyd's own code was broken.", "Report it with the log."
    ),
}
