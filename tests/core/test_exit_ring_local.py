"""No vCPU's thread installs the image's content where memory was given back: every interleaving, one by one.

The programs below are local_install (libpostcopy), pager_drain with exit_ring_hold/open/shut, and madvise(MADV_DONTNEED)
as the kernel does it: announce, wait until that was read, take the page away. One atomic operation a step, under
sequential consistency, which is what the C asks for. That the search would find a wrong byte, or a daemon that waits
for ever, is shown by taking away each of the steps that are there against it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import pytest


class Flaw(StrEnum):
    """A step left out, or two in the wrong order."""

    NONE = "none"
    LOOK_BEFORE_SAYING = "a vCPU looks whether it may before it says that it installs"
    READ_WITHOUT_LOOKING = "the daemon does not look whether somebody installs"
    OPEN_BEFORE_ACTING = "the daemon opens before it has acted on what it read"
    NOT_SHUT = "the daemon does not remember that memory was given back"
    LEAVE_WITHOUT_RINGING = "a vCPU that is through does not ring"


class State(NamedTuple):
    """`tries` are left to the vCPU. page: whether the image's content is there; given_back: it must not be."""

    vcpu: str = "say"
    tries: int = 2
    may: bool = False
    installing: bool = False
    local: str = "open"
    daemon: str = "wait"
    doorbell: bool = False
    balloon: str = "announce"
    changing: bool = False
    queued: bool = False
    was_read: bool = False
    page: bool = False
    given_back: bool = False


def vcpu_step(s: State, flaw: Flaw) -> State | None:
    early = flaw is Flaw.LOOK_BEFORE_SAYING
    match s.vcpu:
        case "say" if s.tries:
            if early and not s.may:
                return s._replace(may=s.local == "open", vcpu="say_late")
            return s._replace(installing=True, tries=s.tries - 1, vcpu="look")
        case "say_late":
            return s._replace(installing=True, tries=s.tries - 1, vcpu="copy" if s.may else "leave")
        case "look":
            return s._replace(vcpu="copy" if s.local == "open" else "leave")
        case "copy":
            # UFFDIO_COPY: EAGAIN while a change is announced and under way.
            return s._replace(page=s.page or not s.changing, may=False, vcpu="leave")
        case "leave":
            return s._replace(installing=False, vcpu="say" if flaw is Flaw.LEAVE_WITHOUT_RINGING else "ring")
        case "ring":
            return s._replace(doorbell=s.doorbell or s.local == "held", vcpu="say")
    return None


def balloon_step(s: State) -> State | None:
    match s.balloon:
        case "announce":
            return s._replace(changing=True, queued=True, balloon="sleep")
        case "sleep" if s.was_read:
            return s._replace(changing=False, balloon="zap")
        case "zap":
            return s._replace(page=False, given_back=True, balloon="done")
    return None


def daemon_step(s: State, flaw: Flaw) -> State | None:
    match s.daemon:
        case "wait" if s.queued or s.doorbell:
            return s._replace(local="held" if s.local != "shut" else "shut", doorbell=False, daemon="look")
        case "look":
            if s.local != "shut" and s.installing and flaw is not Flaw.READ_WITHOUT_LOOKING:
                # Held: nothing but the doorbell brings it back.
                return s._replace(daemon="held")
            return s._replace(daemon="read")
        case "held" if s.doorbell:
            return s._replace(doorbell=False, daemon="look")
        case "read":
            after = "act" if s.queued else "open"
            if s.queued and flaw is Flaw.OPEN_BEFORE_ACTING:
                after = "open_early"
            return s._replace(queued=False, was_read=s.was_read or s.queued, daemon=after)
        case "open_early":
            return s._replace(local="open", daemon="act")
        case "act":
            return s._replace(local=s.local if flaw is Flaw.NOT_SHUT else "shut", daemon="open")
        case "open":
            return s._replace(local=s.local if s.local == "shut" else "open", daemon="wait")
    return None


def search(flaw: Flaw) -> tuple[int, list[State], list[State]]:
    """Return how many states there are, those with a wrong byte, and those in which the balloon waits for ever."""
    first = State()
    seen, frontier = {first}, [first]
    wrong, stuck = [], []
    while frontier:
        state = frontier.pop()
        steps = (vcpu_step(state, flaw), balloon_step(state), daemon_step(state, flaw))
        following = [after for after in steps if after is not None]
        if state.page and state.given_back:
            wrong.append(state)
        if not following and state.balloon != "done":
            stuck.append(state)
        for after in following:
            if after not in seen:
                seen.add(after)
                frontier.append(after)
    return len(seen), wrong, stuck


def test_no_interleaving_brings_back_what_was_given_back() -> None:
    states, wrong, stuck = search(Flaw.NONE)
    assert states > 200
    assert wrong == []
    assert stuck == []


@pytest.mark.parametrize("flaw", [flaw for flaw in Flaw if flaw is not Flaw.NONE])
def test_every_step_against_it_is_needed(flaw: Flaw) -> None:
    _, wrong, stuck = search(flaw)
    assert stuck if flaw is Flaw.LEAVE_WITHOUT_RINGING else wrong
