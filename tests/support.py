"""What a test needs of the host: skip with the reason, or fail where the environment promises the device."""

from __future__ import annotations

import os

import pytest


def _missing(device: str, reason: str) -> None:
    if os.environ.get(f"REQUIRE_{device}") == "1":
        pytest.fail(f"REQUIRE_{device}=1, but {reason}")
    pytest.skip(reason)


def require_kvm() -> None:
    """Skip where /dev/kvm cannot be opened; fail instead with REQUIRE_KVM=1."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as err:
        _missing("KVM", f"/dev/kvm cannot be opened: {err.strerror}")


def require_uffd() -> None:
    """Skip where no userfaultfd with kernel-mode faults can be had; fail instead with REQUIRE_UFFD=1."""
    try:
        os.close(os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC))
    except OSError as err:
        # Without the device the system call is left, for root and where the sysctl allows it.
        if os.geteuid() != 0:
            _missing("UFFD", f"/dev/userfaultfd cannot be opened: {err.strerror}")
