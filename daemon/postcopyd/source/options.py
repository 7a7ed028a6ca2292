"""What a page server allows; one value for every transport that serves the same catalogue."""

from __future__ import annotations

from typing import Literal

import msgspec

from postcopyd._native.image import MESSAGE_OVERHEAD, RUN_ALIGN_MAX, StreamLimits
from postcopyd.units import GIB, MIB

Transport = Literal["grpcio", "native"]


class TlsFiles(msgspec.Struct, frozen=True):
    """PEM files. With `ca`, clients must present a certificate that it signed."""

    cert: str
    key: str
    ca: str = ""


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of a page server. Memory for a stream: its ranges (160 KiB at most) and a message or two.

    Attributes:
        max_data_bytes: the most data in one message; a client with larger pages gets one of them.
        keep: images are served on after Complete, as one snapshot may be restored many times.
        read_threads: reads that wait for a disk at the same time.
        transport: the implementation; on the wire both are gRPC.
    """

    max_ranges: int = 4096
    max_data_bytes: int = MIB
    max_range_bytes: int = GIB
    max_streams: int = 64
    read_threads: int = 4
    keep: bool = False
    transport: Transport = "native"
    tls: TlsFiles | None = None

    @property
    def stream_limits(self) -> StreamLimits:
        return StreamLimits(self.max_ranges, self.max_data_bytes, self.max_range_bytes)

    @property
    def max_message_bytes(self) -> int:
        """The longest message that any stream produces."""
        return max(self.max_data_bytes, RUN_ALIGN_MAX) + MESSAGE_OVERHEAD
