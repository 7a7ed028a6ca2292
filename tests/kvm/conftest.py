"""Guests to test with."""

from __future__ import annotations

import pytest

from postcopyd.vmm.state import GuestKind
from support import require_kvm


@pytest.fixture(params=list(GuestKind))
def guest(request: pytest.FixtureRequest) -> GuestKind:
    """Each kind of guest in turn, KVM's where it can run."""
    kind = GuestKind(request.param)
    if kind is GuestKind.KVM:
        require_kvm()
    return kind
