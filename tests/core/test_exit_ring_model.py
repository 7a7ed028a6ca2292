"""The exit ring's indices against a plain model, whatever the order of steps, and across daemons that die."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from exit_pair import ENTRIES, NOT_OWED, ExitPair, LaneState

VCPUS = 3
Fault = tuple[int, int, int]


class ExitRing(RuleBasedStateMachine):
    """Model: for each vCPU the faults posted and not answered; which of them this daemon has taken."""

    @initialize(start=st.sampled_from([0, 1, (1 << 31) - 8, (1 << 32) - 40]))
    def begin(self, start: int) -> None:
        self.pair = ExitPair(VCPUS, start)
        self.next_sequence = [start] * VCPUS
        self.unanswered: list[set[Fault]] = [set() for _ in range(VCPUS)]
        self.in_batch = [0] * VCPUS
        self.poisoned = [False] * VCPUS
        self.taken: set[Fault] = set()
        self.answered: list[Fault] = []
        self.armed = False

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.close()

    @rule(
        vcpu=st.integers(0, VCPUS - 1), pages=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=ENTRIES)
    )
    def post(self, vcpu: int, pages: list[int]) -> None:
        """Post into an idle lane; the daemon is rung if, and only if, it sleeps."""
        if self.in_batch[vcpu]:
            return
        gpas = [page << 12 for page in pages]
        assert self.pair.post(vcpu, gpas) == self.armed
        self.armed = False
        first = self.next_sequence[vcpu]
        self.unanswered[vcpu] = {(vcpu, gpa, first + nth) for nth, gpa in enumerate(gpas)}
        self.next_sequence[vcpu] += len(gpas)
        self.in_batch[vcpu] = len(gpas)
        self.poisoned[vcpu] = False

    @rule(limit=st.integers(1, 40))
    def drain(self, limit: int) -> None:
        """Nothing comes that was not posted, was answered, or was taken; and something, if there is something."""
        faults = self.pair.drain(limit)
        self.armed = False
        fresh = set().union(*self.unanswered) - self.taken
        assert len(set(faults)) == len(faults)
        assert set(faults) <= fresh
        assert len(faults) == min(limit, len(fresh))
        self.taken |= set(faults)

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), poison=st.sampled_from([0, 0, 0, 1]))
    def answer(self, data: st.DataObject, poison: int) -> None:
        fault = data.draw(st.sampled_from(sorted(self.taken)))
        assert self.pair.complete(*fault, poison) == 0
        self.taken.remove(fault)
        self.unanswered[fault[0]].remove(fault)
        self.poisoned[fault[0]] |= poison == 1
        self.answered.append(fault)

    @precondition(lambda self: self.answered)
    @rule(data=st.data())
    def answer_twice(self, data: st.DataObject) -> None:
        fault = data.draw(st.sampled_from(self.answered))
        if fault not in self.taken:
            assert self.pair.complete(*fault, 0) == NOT_OWED

    @rule(vcpu=st.integers(0, VCPUS - 1))
    def collect(self, vcpu: int) -> None:
        """A vCPU goes on when its last page is answered, not before."""
        state = self.pair.collect(vcpu)
        if self.in_batch[vcpu] == 0:
            assert state == LaneState.IDLE
        elif self.unanswered[vcpu]:
            assert state == LaneState.WAITING
        else:
            assert state == (LaneState.POISONED if self.poisoned[vcpu] else LaneState.IDLE)
            self.in_batch[vcpu] = 0

    @rule()
    def arm(self) -> None:
        """The daemon may sleep only with nothing to take."""
        armed = self.pair.arm()
        if armed:
            assert not set().union(*self.unanswered) - self.taken
        self.armed = armed

    @rule()
    def daemon_dies_and_another_takes_over(self) -> None:
        assert self.pair.restart() == 0
        self.armed = False
        self.taken.clear()

    @invariant()
    def taken_is_unanswered(self) -> None:
        if hasattr(self, "taken"):
            assert self.taken <= set().union(*self.unanswered)


ExitRing.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestExitRing = ExitRing.TestCase
