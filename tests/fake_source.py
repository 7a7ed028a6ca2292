"""A page source that answers as a test tells it: late, in pieces, out of order, or wrong.

It reads and writes by the protobuf library, so the C codec is held against that.
"""

from __future__ import annotations

from dataclasses import dataclass

import xxhash

from postcopyd.pager import Lane
from postcopyd.v1 import page_source_pb2 as pb


@dataclass
class Outstanding:
    request_id: int
    offset: int
    len_bytes: int
    align: int


def run_of(request_id: int, offset: int, data: bytes) -> pb.Run:
    """An honest run of `data`; all zero becomes a zero run."""
    if not any(data):
        return pb.Run(request_id=request_id, offset=offset, length=len(data))
    digest = xxhash.xxh3_64_intdigest(data, seed=offset)
    return pb.Run(request_id=request_id, offset=offset, length=len(data), xxh3_64=digest, data=data)


def reply(*runs: pb.Run) -> bytes:
    return pb.PageReply(runs=runs).SerializeToString()


class FakeSource:
    """Args: image: its bytes. align_at: page size of the region at an offset."""

    def __init__(self, image: bytes, align_at: dict[range, int]) -> None:
        self.image = image
        self._align_at = align_at
        self.outstanding: dict[Lane, list[Outstanding]] = {Lane.DEMAND: [], Lane.BULK: []}
        self.answered: list[int] = []

    def take(self, lane: Lane, body: bytes) -> list[Outstanding]:
        """Read a request; checks what every source may demand of one."""
        request = pb.PageRequest.FromString(body)
        assert request.ranges
        taken = [
            Outstanding(r.request_id, r.offset, r.length, self._align(r.offset, r.length))
            for r in request.ranges
        ]
        known = {o.request_id for ranges in self.outstanding.values() for o in ranges}
        assert len({o.request_id for o in taken} | known) == len(taken) + len(known), "an id twice at a time"
        wanted = pb.PRIORITY_DEMAND if lane is Lane.DEMAND else pb.PRIORITY_BULK
        assert all(r.priority == wanted for r in request.ranges)
        self.outstanding[lane] += taken
        return taken

    def _align(self, offset: int, length: int) -> int:
        for part, align in self._align_at.items():
            if offset in part:
                assert offset + length <= part.stop, "a range over two regions"
                assert offset % align == 0
                assert length % align == 0
                assert length
                return align
        raise AssertionError(f"nothing of the image is at {offset:#x}")

    def forget(self, lane: Lane) -> None:
        """The stream is gone."""
        self.outstanding[lane].clear()

    def piece(self, lane: Lane, index: int, pages: int) -> pb.Run:
        """Up to `pages` pages of the range at `index`, from its front; these are answered then."""
        ranges = self.outstanding[lane]
        asked = ranges[index % len(ranges)]
        length = min(asked.len_bytes, pages * asked.align)
        run = run_of(asked.request_id, asked.offset, self.image[asked.offset : asked.offset + length])
        asked.offset += length
        asked.len_bytes -= length
        if not asked.len_bytes:
            ranges.remove(asked)
            self.answered.append(asked.request_id)
        return run

    def give_up(self, request_id: int) -> None:
        """Answer no more of this range."""
        for ranges in self.outstanding.values():
            ranges[:] = [o for o in ranges if o.request_id != request_id]

    def is_idle(self) -> bool:
        return not any(self.outstanding.values())
