"""The doctor finds what is there, and names what is not together with what to do."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from postcopyd import doctor
from postcopyd.doctor import CHECKS, Finding, HostView, Level
from postcopyd.errors import KernelError
from support import require_kvm, require_uffd

if TYPE_CHECKING:
    from pathlib import Path


def host(folder: Path, **files: str) -> HostView:
    """A host with these files; `__` in a name is a slash."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return HostView(folder)


def test_a_host_that_serves_guests_passes() -> None:
    require_uffd()
    findings = doctor.examine()
    assert [f.check for f in findings if f.level is Level.PROBLEM] == []
    assert len({f.check for f in findings}) == len(CHECKS)


def test_every_finding_that_is_not_ok_says_what_to_do(tmp_path: Path) -> None:
    findings = doctor.examine(host(tmp_path))
    assert all(f.advice for f in findings if f.level is not Level.OK)
    assert any(f.level is Level.PROBLEM for f in findings)


@pytest.mark.parametrize(
    ("release", "level"), [("5.10.0", Level.PROBLEM), ("5.11.3-x", Level.OK), ("6.1.0", Level.OK)]
)
def test_a_kernel_that_is_too_old_is_a_problem(tmp_path: Path, release: str, level: Level) -> None:
    view = host(tmp_path, proc__sys__kernel__osrelease=release)
    assert doctor.check_kernel(view).level is level


def test_a_userfaultfd_is_tried_and_not_assumed() -> None:
    require_uffd()
    assert doctor.check_uffd(HostView()).level is Level.OK


def test_a_refused_userfaultfd_is_a_problem_with_the_permission_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise KernelError("opening a userfaultfd", 0, 0, 1)

    monkeypatch.setattr("postcopyd.vmm.uffd_client.register_memory", refuse)
    finding = doctor.check_uffd(host(tmp_path, proc__sys__vm__unprivileged_userfaultfd="0"))
    assert finding.level is Level.PROBLEM
    assert "vm.unprivileged_userfaultfd is 0" in finding.advice
    assert "EPERM" in finding.found


@pytest.mark.parametrize("device", ["userfaultfd", "kvm"])
def test_a_device_that_is_something_else_is_noted(tmp_path: Path, device: str) -> None:
    view = host(tmp_path, **{f"dev__{device}": ""})
    check = doctor.check_kvm if device == "kvm" else doctor.check_uffd_device
    assert check(view).level is Level.NOTE


def test_kvm_is_opened() -> None:
    require_kvm()
    assert doctor.check_kvm(HostView()).level is Level.OK


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"sys__module__kvm_intel__parameters__ept": "Y\n"}, "hardware (ept)"),
        ({"sys__module__kvm_amd__parameters__npt": "1"}, "hardware (npt)"),
        (
            {"sys__module__kvm_intel__parameters__ept": "N", "sys__module__kvm__parameters__tdp_mmu": "N"},
            "shadow",
        ),
        ({}, "unknown"),
    ],
)
def test_paging_is_named(tmp_path: Path, files: dict[str, str], found: str) -> None:
    assert doctor.check_paging(host(tmp_path, **files)).found == found


def test_little_memory_is_a_problem(tmp_path: Path) -> None:
    finding = doctor.check_memory(host(tmp_path, proc__meminfo="MemTotal: 8 kB\nMemAvailable: 1024 kB\n"))
    assert finding.level is Level.PROBLEM


def test_reserved_huge_pages_are_counted(tmp_path: Path) -> None:
    pool = "sys__kernel__mm__hugepages__hugepages-2048kB__"
    view = host(tmp_path, **{f"{pool}nr_hugepages": "8", f"{pool}free_hugepages": "3"})
    assert doctor.check_huge_pages(view) == Finding("huge pages", Level.OK, "3 of 8 pages of 2048kB free")


def test_the_command_fails_if_guests_cannot_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Finding("memory", Level.PROBLEM, "none", "Buy some.")
    monkeypatch.setattr(doctor, "examine", lambda: [bad])
    result = CliRunner().invoke(doctor.doctor, ["--json"])
    assert result.exit_code == 1
    assert json.loads(result.output) == [
        {"check": "memory", "level": "problem", "found": "none", "advice": "Buy some."}
    ]
    assert "Buy some." in CliRunner().invoke(doctor.doctor, []).output


def test_the_doctor_leaves_no_descriptor_open() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    doctor.examine()
    assert sorted(os.listdir("/proc/self/fd")) == before
