"""The ledger against a plain list of states."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from postcopyd.ledger import Ledger, PageCommand, PageEvent, PageState, transition

events = st.sampled_from(PageEvent)
states = st.sampled_from(PageState)


class LedgerAgainstModel(RuleBasedStateMachine):
    @initialize(pages=st.one_of(st.integers(0, 4), st.integers(30, 34), st.integers(60, 200)))
    def begin(self, pages: int) -> None:
        self.pages = pages
        self.ledger = Ledger(pages)
        self.model = [PageState.MISSING] * pages

    def range_of(self, data: st.DataObject) -> tuple[int, int]:
        first = data.draw(st.integers(0, self.pages))
        return first, data.draw(st.integers(0, self.pages - first))

    @rule(data=st.data(), event=events)
    def one_page(self, data: st.DataObject, event: PageEvent) -> None:
        if not self.pages:
            return
        page = data.draw(st.integers(0, self.pages - 1))
        self.model[page], command = transition(event, self.model[page])
        assert self.ledger.apply(event, page) is command

    @rule(data=st.data(), event=events)
    def a_range(self, data: st.DataObject, event: PageEvent) -> None:
        first, count = self.range_of(data)
        before = self.model[first : first + count]
        after = [transition(event, state)[0] for state in before]
        self.model[first : first + count] = after
        changed = sum(a is not b for a, b in zip(before, after, strict=True))
        assert self.ledger.apply_range(event, first, count) == changed

    @rule(data=st.data(), state=states)
    def find(self, data: st.DataObject, state: PageState) -> None:
        first, count = self.range_of(data)
        part = self.model[first : first + count]
        expected = first + part.index(state) if state in part else None
        assert self.ledger.find(state, first, first + count) == expected

    @rule(data=st.data(), wanted=st.sets(states))
    def run(self, data: st.DataObject, wanted: set[PageState]) -> None:
        first, count = self.range_of(data)
        length = 0
        while length < count and self.model[first + length] in wanted:
            length += 1
        assert self.ledger.run(wanted, first, first + count) == length

    @invariant()
    def counts_and_states_agree(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert self.ledger.counts() == {state: self.model.count(state) for state in PageState}
        assert [self.ledger.state(page) for page in range(self.pages)] == self.model


TestLedgerAgainstModel = LedgerAgainstModel.TestCase
TestLedgerAgainstModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_content_is_installed_only_over_a_page_that_is_owed() -> None:
    for state in PageState:
        _, command = transition(PageEvent.ARRIVED, state)
        owed = state in (PageState.MISSING, PageState.REQUESTED)
        assert command is (PageCommand.INSTALL if owed else PageCommand.DISCARD)


def test_a_removed_page_is_never_fetched_again() -> None:
    for event in PageEvent:
        state, command = transition(event, PageState.ZERO)
        assert state is PageState.ZERO
        assert command not in (PageCommand.FETCH, PageCommand.WAIT, PageCommand.INSTALL)


def test_every_fault_leads_to_an_answer() -> None:
    for state in PageState:
        _, command = transition(PageEvent.FAULTED, state)
        assert command in (PageCommand.FETCH, PageCommand.WAIT, PageCommand.ZERO_FILL)


def test_a_lost_answer_never_takes_back_what_is_in_place() -> None:
    assert transition(PageEvent.LOST, PageState.REQUESTED)[0] is PageState.MISSING
    assert transition(PageEvent.LOST, PageState.PRESENT)[0] is PageState.PRESENT
    assert transition(PageEvent.LOST, PageState.ZERO)[0] is PageState.ZERO
