"""No wake-up is lost: every interleaving of the ring's atomic steps, looked at one by one.

The programs below are exit_ring_drain/complete/arm and exit_lane_post/collect/doze with FUTEX_WAIT, one atomic
operation a step, under sequential consistency, which is what the C asks for wherever two variables matter. A state in
which nobody can move and a vCPU has not finished is a lost wake-up. That the search would find one is shown by taking
away each of the steps that are there against it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import pytest


class Flaw(StrEnum):
    """A step left out, or two in the wrong order."""

    NONE = "none"
    ARM_WITHOUT_LOOKING = "the daemon arms and does not look at the pending bits again"
    LOOK_BEFORE_PENDING = "a vCPU looks at `armed` before it sets its bit"
    SLEEP_WITHOUT_LOOKING = "a vCPU reads the futex word and does not look for answers again"
    WORD_AFTER_LOOKING = "a vCPU reads the futex word after its last look"
    WAKE_WITHOUT_WORD = "the daemon wakes and does not change the futex word"
    LOOK_BEFORE_ANSWER = "the daemon looks whether a vCPU sleeps before it answers"


class Vcpu(NamedTuple):
    """`left` faults are to be posted, `posted` are, `done` answered; `word` is the futex word as read."""

    left: int
    at: str = "post"
    posted: int = 0
    done: int = 0
    wake: int = 0
    sleeping: bool = False
    word: int = 0
    asleep: bool = False
    pending: bool = False
    saw_armed: bool = False


class Daemon(NamedTuple):
    at: str = "exchange"
    backlog: frozenset[int] = frozenset()
    saw_sleeping: bool = False


class State(NamedTuple):
    vcpus: tuple[Vcpu, ...]
    daemon: Daemon = Daemon()
    armed: bool = False
    doorbell: bool = False


def vcpu_step(state: State, index: int, flaw: Flaw) -> State | None:
    """Return the state after the vCPU's next step, None if it cannot move."""
    vcpu = state.vcpus[index]
    armed, doorbell = state.armed, state.doorbell
    early_look = flaw is Flaw.LOOK_BEFORE_PENDING
    match vcpu.at:
        case "post" if vcpu.left:
            vcpu = vcpu._replace(
                left=vcpu.left - 1, posted=vcpu.posted + 1, at="look" if early_look else "set_pending"
            )
        case "set_pending":
            vcpu = vcpu._replace(pending=True, at="act" if early_look else "look")
        case "look":
            vcpu = vcpu._replace(saw_armed=armed, at="set_pending" if early_look else "act")
        case "act" if vcpu.saw_armed:
            vcpu = vcpu._replace(at="ring" if armed else "collect")
            armed = False
        case "act":
            vcpu = vcpu._replace(at="collect")
        case "ring":
            doorbell = True
            vcpu = vcpu._replace(at="collect")
        case "collect":
            after = "post" if vcpu.done == vcpu.posted else "read_word"
            if after == "read_word" and flaw is Flaw.WORD_AFTER_LOOKING:
                after = "announce"
            vcpu = vcpu._replace(at=after)
        case "read_word":
            late = flaw is Flaw.WORD_AFTER_LOOKING
            vcpu = vcpu._replace(word=vcpu.wake, at="futex" if late else "announce")
        case "announce":
            instead = {Flaw.SLEEP_WITHOUT_LOOKING: "futex", Flaw.WORD_AFTER_LOOKING: "read_word"}
            vcpu = vcpu._replace(sleeping=True, at=instead.get(flaw, "look_again"))
        case "look_again":
            vcpu = vcpu._replace(at="rouse" if vcpu.done == vcpu.posted else "futex")
        case "futex" if vcpu.word == vcpu.wake:
            # The kernel compares and queues in one step.
            vcpu = vcpu._replace(asleep=True, at="asleep")
        case "futex":
            vcpu = vcpu._replace(at="rouse")
        case "asleep" if not vcpu.asleep:
            vcpu = vcpu._replace(at="rouse")
        case "rouse":
            vcpu = vcpu._replace(sleeping=False, at="collect")
        case _:
            return None
    vcpus = tuple(vcpu if i == index else other for i, other in enumerate(state.vcpus))
    return State(vcpus, state.daemon, armed, doorbell)


def daemon_step(state: State, flaw: Flaw) -> State | None:
    daemon = state.daemon
    vcpus = list(state.vcpus)
    armed, doorbell = state.armed, state.doorbell
    lane = min(daemon.backlog, default=0)
    vcpu = vcpus[lane]
    early_look = flaw is Flaw.LOOK_BEFORE_ANSWER
    match daemon.at:
        case "exchange":
            backlog = frozenset(i for i, each in enumerate(vcpus) if each.pending)
            vcpus = [each._replace(pending=False) for each in vcpus]
            first = "look_sleeping" if early_look else "answer"
            daemon = daemon._replace(backlog=backlog, at=first if backlog else "arm")
        case "answer":
            vcpus[lane] = vcpu._replace(done=vcpu.posted)
            daemon = daemon._replace(at="look_sleeping" if flaw is Flaw.WAKE_WITHOUT_WORD else "wake_word")
        case "wake_word":
            vcpus[lane] = vcpu._replace(wake=vcpu.wake + 1)
            daemon = daemon._replace(at="futex_wake" if early_look else "look_sleeping")
        case "look_sleeping":
            daemon = daemon._replace(saw_sleeping=vcpu.sleeping, at="answer" if early_look else "futex_wake")
        case "futex_wake":
            if daemon.saw_sleeping:
                vcpus[lane] = vcpu._replace(asleep=False)
            daemon = daemon._replace(at="next")
        case "next":
            backlog = daemon.backlog - {lane}
            first = "look_sleeping" if early_look else "answer"
            daemon = Daemon(at=first if backlog else "exchange", backlog=backlog)
        case "arm":
            armed = True
            daemon = daemon._replace(at="poll" if flaw is Flaw.ARM_WITHOUT_LOOKING else "look_pending")
        case "look_pending":
            if any(each.pending for each in vcpus):
                armed = False
                daemon = daemon._replace(at="exchange")
            else:
                daemon = daemon._replace(at="poll")
        case "poll" if doorbell:
            doorbell = False
            daemon = daemon._replace(at="exchange")
        case _:
            return None
    return State(tuple(vcpus), daemon, armed, doorbell)


def stuck_states(flaw: Flaw, vcpus: int, faults: int) -> tuple[int, list[State]]:
    """Return how many states there are, and those in which a vCPU waits for ever."""
    first = State((Vcpu(left=faults),) * vcpus)
    seen = {first}
    frontier = [first]
    stuck = []
    while frontier:
        state = frontier.pop()
        steps = [vcpu_step(state, index, flaw) for index in range(vcpus)]
        following = [after for after in (*steps, daemon_step(state, flaw)) if after is not None]
        if not following and any(each.left or each.done < each.posted for each in state.vcpus):
            stuck.append(state)
        for after in following:
            if after not in seen:
                seen.add(after)
                frontier.append(after)
    return len(seen), stuck


@pytest.mark.parametrize(("vcpus", "faults"), [(1, 3), (2, 1)])
def test_no_interleaving_loses_a_wake_up(vcpus: int, faults: int) -> None:
    states, stuck = stuck_states(Flaw.NONE, vcpus, faults)
    assert states > 500
    assert stuck == []


@pytest.mark.parametrize("flaw", [flaw for flaw in Flaw if flaw is not Flaw.NONE])
def test_every_step_against_it_is_needed(flaw: Flaw) -> None:
    assert stuck_states(flaw, vcpus=1, faults=2)[1]
