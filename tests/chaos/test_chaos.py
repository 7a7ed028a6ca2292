"""A few of every fault, at random moments, under the shipped unit. `make chaos` does the same for ten minutes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from chaos.network import require_network
from chaos.runner import SHORT, Chaos
from chaos.tally import Goal
from private_systemd import require_systemd
from support import require_uffd

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(300)
async def test_nothing_is_lost_whatever_fails(tmp_path: Path) -> None:
    require_systemd()
    require_network()
    require_uffd()
    seed = int(os.environ.get("CHAOS_SEED", "1"))
    tally = await Chaos(SHORT, seed, tmp_path, print).run()
    assert tally.is_good(Goal(SHORT.kills, SHORT.restarts, len(SHORT.cuts))), tally.to_json()
