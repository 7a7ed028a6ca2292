"""libpostcopy-preload.so: where it is, and the variables that tell it what to do."""

from __future__ import annotations

from pathlib import Path

LIBRARY = "libpostcopy-preload.so"
RAM_VARIABLE = "POSTCOPYD_RAM"
SOCKET_VARIABLE = "POSTCOPYD_SOCKET"
WAIT_VARIABLE = "POSTCOPYD_WAIT"


def library_path() -> Path:
    """The shim that came with this package, for LD_PRELOAD."""
    return Path(__file__).resolve().parent.parent / "_native" / LIBRARY


def environment(ram: str, socket_path: str, *, wait: bool) -> dict[str, str]:
    """The variables for a VMM whose memory is the file `ram`; `wait`: until a migration is prepared."""
    variables = {"LD_PRELOAD": str(library_path()), RAM_VARIABLE: ram, SOCKET_VARIABLE: socket_path}
    return {**variables, WAIT_VARIABLE: "1"} if wait else variables
