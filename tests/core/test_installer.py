"""What follows a batch of replies, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from postcopyd.installer import Installer

if TYPE_CHECKING:
    from postcopyd.pager import Pager


@dataclass
class Numbers:
    """A pager that has signals and nothing else."""

    demand_inflight: int = 0
    feed_address: tuple[int, int] = (0, 0)

    def take_signals(self) -> int:
        return 5


def make(pager: Numbers) -> tuple[Installer, list[str]]:
    log: list[str] = []
    installer = Installer(
        cast("Pager", pager),
        dispatch=lambda signals: log.append(f"signals {signals}"),
        drain=lambda: log.append("drained"),
        answered=lambda: log.append("answered"),
    )
    return installer, log


def test_while_others_wait_faults_are_taken_before_more_is_asked_for() -> None:
    installer, log = make(Numbers(demand_inflight=1))
    installer.fed()
    assert log == ["signals 5", "drained", "answered"]


def test_with_nobody_waiting_no_fault_is_looked_for() -> None:
    installer, log = make(Numbers())
    installer.fed()
    assert log == ["signals 5", "answered"]


def test_what_comes_behind_the_end_is_nothing() -> None:
    installer, log = make(Numbers(demand_inflight=1))
    installer.close()
    installer.fed()
    assert log == []
