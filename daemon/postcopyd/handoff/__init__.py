"""How VMMs hand their memory over: one socket, several formats, one result."""

from __future__ import annotations

from .descriptors import OwnedFd
from .framed import AddRegion
from .message import MAX_MESSAGE_BYTES, UFFD, HandoffMessage, Incomplete, Missing, Mode
from .offer import Handoff
from .peer import Peer
from .receive import RECEIVE_TIMEOUT_S, receive_handoff
from .regions import MemoryRegion, check_regions
from .socket import HandoffListener

__all__ = [
    "MAX_MESSAGE_BYTES",
    "RECEIVE_TIMEOUT_S",
    "UFFD",
    "AddRegion",
    "Handoff",
    "HandoffListener",
    "HandoffMessage",
    "Incomplete",
    "MemoryRegion",
    "Missing",
    "Mode",
    "OwnedFd",
    "Peer",
    "check_regions",
    "receive_handoff",
]
