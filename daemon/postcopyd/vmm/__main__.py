"""`python -m postcopyd.vmm source|destination`: a VMM process, driven by lines of JSON (see console.py)."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import click
import structlog

from ..errors import PostcopyError
from ..units import parse_size
from .console import Console
from .guestmem import GuestMemory, MemoryKind
from .handoff_client import HandoffFormat
from .machine import Machine
from .state import GuestKind, Order, Shape
from .uffd_client import Feature, register_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from enum import StrEnum


def _size(_ctx: click.Context, _param: click.Parameter, value: str) -> int:
    try:
        return parse_size(value)
    except PostcopyError as err:
        raise click.BadParameter(err.message) from err


def _choice(members: Iterable[StrEnum]) -> click.Choice[str]:
    # Of values: newer versions of click would take the names of an enum's members.
    return click.Choice([member.value for member in members])


def _shape_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that source and destination must have in common; the command gets them as `shape`."""

    @wraps(function)
    def command(
        *, memory: int, vcpus: int, order: str, seed: int, passes: int, spare: int, **others: object
    ) -> None:
        shape = Shape(
            memory_bytes=memory, vcpus=vcpus, order=Order(order), seed=seed, passes=passes, spare_bytes=spare
        )
        function(shape=shape, **others)

    for option in (
        click.option("--memory", callback=_size, default="256M", show_default=True, help="Guest memory."),
        click.option("--vcpus", type=click.IntRange(1, 64), default=1, show_default=True),
        click.option("--order", type=_choice(Order), default="sequential", show_default=True),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1, show_default=True),
        click.option("--passes", type=click.IntRange(0), default=0, help="End after so many; 0 never."),
        click.option(
            "--spare", callback=_size, default="0", help="Memory at the end that the guest never touches."
        ),
        click.option("--guest", type=_choice(GuestKind), default="kvm", show_default=True),
    ):
        command = option(command)
    return command


def _greeting(role: str, machine: Machine) -> dict[str, object]:
    return {
        "ready": role,
        "pid": os.getpid(),
        "guest": machine.guest,
        "tids": machine.tids,
        "host_virt_addr": machine.memory.address,
        "memory_bytes": machine.shape.memory_bytes,
    }


@click.group()
def main() -> None:
    """Run a small virtual machine whose guest can be moved and checked."""
    # Standard output belongs to the answers.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


@main.command()
@_shape_options
@click.option("--ram", type=click.Path(path_type=Path), required=True, help="New file for memory, on tmpfs.")
def source(shape: Shape, guest: str, ram: Path) -> None:
    """Run a guest in a memory file that a page server can serve."""
    with ExitStack() as stack:
        mem = stack.enter_context(GuestMemory(MemoryKind.FILE, shape.memory_bytes, ram))
        machine = stack.enter_context(Machine(shape, mem, GuestKind(guest)))
        machine.fill()
        console = Console(machine)
        stack.callback(console.close)
        console.run(sys.stdin.buffer, sys.stdout.buffer, _greeting("source", machine))


@main.command()
@_shape_options
@click.option(
    "--memory-kind",
    type=_choice(kind for kind in MemoryKind if kind is not MemoryKind.FILE),
    default="anonymous",
    show_default=True,
)
@click.option(
    "--socket", type=click.Path(path_type=Path), help="Hand memory over to the daemon listening here."
)
@click.option("--format", "fmt", type=_choice(HandoffFormat), default="framed", show_default=True)
@click.option("--regions", type=click.IntRange(1, 64), default=1, help="Hand memory over in so many pieces.")
@click.option(
    "--faults",
    type=click.Choice(["uffd", "exits"]),
    default="uffd",
    show_default=True,
    help="How a vCPU's absent pages are reported.",
)
@click.option("--thread-id", is_flag=True, help="Ask for thread ids in fault messages.")
def destination(
    shape: Shape,
    guest: str,
    memory_kind: str,
    socket: Path | None,
    fmt: str,
    regions: int,
    faults: str,
    thread_id: bool,
) -> None:
    """Run a guest whose memory comes on demand."""
    features = Feature.EVENT_REMOVE | (Feature.THREAD_ID if thread_id else Feature(0))
    with ExitStack() as stack:
        mem = stack.enter_context(GuestMemory(MemoryKind(memory_kind), shape.memory_bytes))
        uffd = (
            stack.enter_context(register_memory(mem, features, user_mode_only=faults == "exits"))
            if socket
            else None
        )
        machine = stack.enter_context(Machine(shape, mem, GuestKind(guest)))
        console = Console(machine, uffd, handoff_format=HandoffFormat(fmt), regions=regions, must_load=True)
        stack.callback(console.close)
        if socket and uffd and faults == "exits":
            machine.use_exits(socket, uffd)
        elif socket:
            console.hand_off(socket)
        console.run(sys.stdin.buffer, sys.stdout.buffer, _greeting("destination", machine))


if __name__ == "__main__":
    try:
        main(prog_name="python -m postcopyd.vmm")
    except PostcopyError as err:
        click.echo(str(err), err=True)
        sys.exit(err.exit_status)
