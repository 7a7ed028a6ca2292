"""Atheris target: arbitrary bytes on a VMM's socket. `python fuzz_socket.py handoff|exits [libFuzzer options] CORPUS`.

The first byte says in what steps the rest arrives. Whatever comes is a message, the wish for more, or a HandoffError
that says something; what is kept of it is bounded, and no byte of a request is lost or taken twice.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import atheris

with atheris.instrument_imports(include=["postcopyd.handoff", "postcopyd.errors"]):
    from postcopyd.errors import HandoffError
    from postcopyd.handoff.detect import FormatDetector
    from postcopyd.handoff.exit_frames import (
        LENGTH,
        MAX_BITCODE_BYTES,
        MAX_JSON_BYTES,
        FaultReply,
        Form,
        RequestReader,
        decode_reply,
        frame_reply,
    )
    from postcopyd.handoff.message import BITMAP, GUEST_MEMFD, MEMFD, STATE, UFFD, Incomplete

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVED = frozenset({UFFD, MEMFD, STATE, BITMAP, GUEST_MEMFD})


def pieces(data: bytes) -> Iterator[bytes]:
    step = data[0] + 1 if data else 1
    yield from (data[at : at + step] for at in range(1, len(data), step))


def check_error(error: HandoffError) -> None:
    assert error.message, "an error without a word"


def handoff(data: bytes) -> None:
    """With one descriptor, and with as many as a framed one may name."""
    for descriptors in (0, 1, len(SERVED)):
        parser = FormatDetector(SERVED)
        try:
            for piece in pieces(data):
                state = parser.feed(piece, descriptors)
                if not isinstance(state, Incomplete):
                    assert state.regions, "a hand-off of nothing"
                    assert all(region.size_bytes > 0 for region in state.regions)
                    assert len(state.descriptor_names) == descriptors
                    break
        except HandoffError as error:
            check_error(error)


def exits(data: bytes) -> None:
    reader = RequestReader()
    came, taken = b"", b""
    try:
        for piece in pieces(data):
            came += piece
            for received in reader.feed(piece):
                taken += received.frame
                check_answer(received.form, received.request.vcpu, received.request.offset)
            assert taken + reader.partial == came, "bytes were lost, or taken twice"
            assert len(reader.partial) <= max(LENGTH.size + MAX_BITCODE_BYTES, MAX_JSON_BYTES)
    except HandoffError as error:
        check_error(error)


def check_answer(form: Form, vcpu: int, offset: int) -> None:
    """Whatever could be asked can be answered."""
    reply = FaultReply(vcpu=vcpu, offset=offset, len_bytes=4096, flags=0, gpa=None, zero=False)
    framed = frame_reply(reply, form)
    if form is Form.BITCODE:
        assert decode_reply(framed[LENGTH.size :]) == reply


if __name__ == "__main__":
    target = {"handoff": handoff, "exits": exits}[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
