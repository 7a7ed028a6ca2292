"""What the store kept of a session, judged: whether the next process can serve it, or may let it go."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .attachment import STATE, UFFD, Attachment, Phase, SessionRecord
from .errors import InvariantError
from .state_memory import StateMemory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .handoff.descriptors import OwnedFd


@dataclass
class Kept:
    """A session as an earlier process left it.

    can_be_served: otherwise nobody needs it. Either its memory was released, or the store never held all of it, so that
    the VMM was told nothing and will hand over again.
    """

    record: SessionRecord
    state: StateMemory
    can_be_served: bool
    _fds: Mapping[str, OwnedFd]

    def attachment(self) -> Attachment:
        """The VMM's descriptors, to be owned by the caller like `state`."""
        self._fds[STATE].take()
        return Attachment.from_store(self.record, self._fds)

    def close(self) -> None:
        self._fds[STATE].take()
        self.state.close()
        for fd in self._fds.values():
            fd.close()


def examine(id: str, fds: Mapping[str, OwnedFd]) -> Kept:
    """Read what the store kept under `id`, by kind. Nothing changes hands.

    Raises:
        InvariantError: it is not whole, or not ours. It must be kept open: its guest would read zeros.
    """
    if STATE not in fds:
        raise InvariantError(f"the store kept {sorted(fds)} of it, and not its state")
    fd = fds[STATE].fileno()
    try:
        state = StateMemory(fd, os.fstat(fd).st_size)
    except (OSError, ValueError) as error:
        raise InvariantError(f"its state memory cannot be mapped: {error}") from error
    try:
        record = SessionRecord.decode(state.descriptor)
        if record.spec.id != id:
            raise InvariantError(f"its state memory is of migration {record.spec.id!r}")
        return Kept(record, state, _can_be_served(record, fds), fds)
    except BaseException:
        state.unmap()
        raise


def _can_be_served(record: SessionRecord, fds: Mapping[str, OwnedFd]) -> bool:
    """Raises InvariantError: something is missing that must not."""
    missing = set(record.kinds) - fds.keys()
    match record.phase:
        case Phase.ENDED:
            return False
        case Phase.STORING:
            # A VMM that waits for no answer will not come again, so it is served with whatever there is.
            return not missing or (not record.wants_ack and UFFD in fds)
        case Phase.HELD:
            if UFFD not in fds:
                raise InvariantError(
                    f"the store kept {sorted(fds)} of it; without its userfaultfd it cannot be served"
                )
            return True
