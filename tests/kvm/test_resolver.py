"""Which pages an instruction needs: the resolver's answer against what the processor touched, on the real kernel.

Each case runs in a guest with all its memory, where the guest's own accessed bits tell the pages, and in one whose
memory comes through libpostcopy. Pages are numbers of the memory under test, which begins at 0x200000.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from support import require_kvm
from support_uffd import open_uffd

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "daemon" / "native"
LIBRARY = ROOT / "daemon" / "libpostcopy"

RDI, RSI, RSP, RBP, RBX = 0x210000, 0x220000, 0x230000, 0x238000, 0x218000
RDI_PAGE, RSI_PAGE, RSP_PAGE, RBP_PAGE, RBX_PAGE = 16, 32, 48, 56, 24
STOP = 0x10000
TABLE_PAGES = {60, 61, 62, 63}


class Outcome(msgspec.Struct):
    """What resolver_guest prints."""

    touched: set[int]
    asked: set[int]
    events: set[int]
    annotated: int
    bare: int
    mmio: int
    emulation: int
    problem: str
    same_registers: bool
    same_memory: bool


@dataclass(frozen=True)
class Case:
    """An instruction, what it works on, and the pages it touches besides its own, page 0."""

    name: str
    code: str
    setup: str
    pages: frozenset[int]
    needs: str = ""


def case(name: str, code: str, setup: str, *pages: int, needs: str = "") -> Case:
    return Case(name, code, setup, frozenset(pages) | {0}, needs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    require_kvm()
    # Also a test that this host lets a process have one.
    with open(open_uffd(), "rb", buffering=0):
        pass
    program = tmp_path_factory.mktemp("resolver") / "resolver_guest"
    sources = [
        ROOT / "tests" / "kvm" / "resolver_guest.c",
        ROOT / "tests" / "doubles" / "exit_daemon.c",
        *sorted(path for path in LIBRARY.glob("*.c") if not path.name.startswith("preload")),
        *(NATIVE / f"exit_ring{part}.c" for part in ("", "_map", "_vmm")),
    ]
    subprocess.run(
        ["gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", "-o", str(program)]
        + [str(source) for source in sources]
        + ["-lcapstone", "-pthread"],
        check=True,
    )

    def runner(cpl: int, code: str, setup: str = "") -> Outcome:
        command = [str(program), str(cpl), code, *setup.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, done.stderr
        return msgspec.json.decode(done.stdout, type=Outcome)

    return runner


def skip_without(flag: str) -> None:
    if flag and flag not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this processor has no {flag}")


USER_CASES = [
    case("nothing but its code", "90", ""),
    case("code across pages", "810744332211", f"rip=0x200ffd rdi={RDI}", 1, RDI_PAGE),
    case("code that ends with its page", "488b07", f"rip=0x200ffd rdi={RDI}", 1, RDI_PAGE),
    case("load", "488b07", f"rdi={RDI}", RDI_PAGE),
    case("load across pages", "488b07", f"rdi={RDI + 0xFFC}", RDI_PAGE, RDI_PAGE + 1),
    case("store", "8807", f"rdi={RDI + 0xFFF}", RDI_PAGE),
    case("store across pages", "488907", f"rdi={RDI + 0xFFF}", RDI_PAGE, RDI_PAGE + 1),
    case("base, index and displacement", "4a8b44ff10", f"rdi={RDI} r15=0x1ff", RDI_PAGE + 1),
    case("negative displacement", "488b47f8", f"rdi={RDI}", RDI_PAGE - 1),
    case("relative to rip", "488b0500300000", "", 3),
    case("absolute", "48a1fc0f210000000000", "", RDI_PAGE, RDI_PAGE + 1),
    case("32-bit address", "678b07", f"rdi={0x11 << 32 | RDI}", RDI_PAGE),
    case("read, change, write", "810744332211", f"rdi={RDI + 0xFFE}", RDI_PAGE, RDI_PAGE + 1),
    case("exchange", "488707", f"rdi={RDI}", RDI_PAGE),
    case("locked add", "f0480fc107", f"rdi={RDI}", RDI_PAGE),
    case("compare and exchange 16 bytes", "480fc70f", f"rdi={RDI}", RDI_PAGE),
    case("conditional move that is not taken", "480f4407", f"rdi={RDI}", RDI_PAGE),
    case("bit string below its operand", "480fab07", f"rdi={RDI} rax=-1", RDI_PAGE - 1),
    case("bit string beyond its operand", "480fab07", f"rdi={RDI} rax=0x8000", RDI_PAGE + 1),
    case("table look-up", "d7", f"rbx={RBX + 0xFFF} rax=1", RBX_PAGE + 1),
    case("cache line flush", "0fae3f", f"rdi={RDI}", RDI_PAGE),
    case("hint", "0f1f07", f"rdi={RDI}"),
    case("prefetch", "0f180f", f"rdi={RDI}"),
    case("address only", "488d07", f"rdi={RDI}"),
    case("jump through memory", "ff27", f"rdi={RDI} @{RDI}={STOP}", RDI_PAGE),
    # The stack.
    case("push", "50", f"rsp={RSP}", RSP_PAGE - 1),
    case("push across pages", "50", f"rsp={RSP + 4}", RSP_PAGE - 1, RSP_PAGE),
    case("push of 2 bytes", "6650", f"rsp={RSP + 1}", RSP_PAGE - 1, RSP_PAGE),
    case("push from memory", "ff37", f"rdi={RDI} rsp={RSP}", RDI_PAGE, RSP_PAGE - 1),
    case("pop", "58", f"rsp={RSP + 0xFFC}", RSP_PAGE, RSP_PAGE + 1),
    case("pop to memory", "8f07", f"rdi={RDI} rsp={RSP}", RDI_PAGE, RSP_PAGE),
    case("pop relative to the stack it leaves", "8f442408", f"rsp={RSP + 0xFF0}", RSP_PAGE, RSP_PAGE + 1),
    case("push flags", "9c", f"rsp={RSP}", RSP_PAGE - 1),
    case("pop flags", "9d", f"rsp={RSP} @{RSP}=0x3002", RSP_PAGE),
    case("call", "e800000000", f"rsp={RSP}", RSP_PAGE - 1),
    case(
        "call through memory",
        "ff17",
        f"rdi={RDI} @{RDI}={STOP} rsp={RSP + 4}",
        RDI_PAGE,
        RSP_PAGE - 1,
        RSP_PAGE,
    ),
    case("return", "c3", f"rsp={RSP + 0xFFC} @{RSP + 0xFFC}={STOP}", RSP_PAGE, RSP_PAGE + 1),
    case("return and drop", "c20800", f"rsp={RSP} @{RSP}={STOP}", RSP_PAGE),
    case(
        "far return",
        "48cb",
        f"rsp={RSP + 0xFF8} @{RSP + 0xFF8}={STOP} @{RSP + 0x1000}=0x33",
        RSP_PAGE,
        RSP_PAGE + 1,
    ),
    case(
        "return from interrupt",
        "48cf",
        f"rsp={RSP + 0xFF0} @{RSP + 0xFF0}={STOP} @{RSP + 0xFF8}=0x33 @{RSP + 0x1000}=0x3002"
        f" @{RSP + 0x1008}={RSP + 0x2000} @{RSP + 0x1010}=0x2b",
        RSP_PAGE,
        RSP_PAGE + 1,
    ),
    case("enter", "c8100000", f"rsp={RSP + 8}", RSP_PAGE - 1, RSP_PAGE),
    case("enter with a large frame", "c8002000", f"rsp={RSP + 8}", RSP_PAGE - 2, RSP_PAGE),
    case(
        "nested enter",
        "c8001003",
        f"rsp={RSP + 8} rbp={RBP + 8}",
        RSP_PAGE - 2,
        RSP_PAGE - 1,
        RSP_PAGE,
        RBP_PAGE - 1,
        RBP_PAGE,
    ),
    case("leave", "c9", f"rsp={RSP} rbp={RBP}", RBP_PAGE),
    # Strings.
    case(
        "move string",
        "f3a4",
        f"rdi={RDI + 0xFFE} rsi={RSI + 0xFFD} rcx=6",
        RDI_PAGE,
        RDI_PAGE + 1,
        RSI_PAGE,
        RSI_PAGE + 1,
    ),
    case(
        "move string backwards",
        "fdf3a4",
        f"rdi={RDI + 1} rsi={RSI + 2} rcx=4",
        RDI_PAGE - 1,
        RDI_PAGE,
        RSI_PAGE - 1,
        RSI_PAGE,
    ),
    case(
        "move string, one element across pages",
        "48a5",
        f"rdi={RDI + 0xFFC} rsi={RSI}",
        RDI_PAGE,
        RDI_PAGE + 1,
        RSI_PAGE,
    ),
    case("move string, used up", "f3a4", f"rdi={RDI} rsi={RSI} rcx=0"),
    case("store string", "f348ab", f"rdi={RDI} rcx=1536", RDI_PAGE, RDI_PAGE + 1, RDI_PAGE + 2),
    case("scan string", "f2ae", f"rdi={RDI + 0xFFF} rcx=2 rax=0x100", RDI_PAGE, RDI_PAGE + 1),
    case("compare string", "f3a6", f"rdi={RDI} rsi={RSI} rcx=1", RDI_PAGE, RSI_PAGE),
    case("load string", "48ad", f"rsi={RSI + 0xFFC}", RSI_PAGE, RSI_PAGE + 1),
    # Vectors and state.
    case("16-byte load", "0f1007", f"rdi={RDI + 0xFF8}", RDI_PAGE, RDI_PAGE + 1),
    case("16-byte store", "f30f7f07", f"rdi={RDI + 0xFF8}", RDI_PAGE, RDI_PAGE + 1),
    case("32-byte load", "c5fc1007", f"rdi={RDI + 0xFF0}", RDI_PAGE, RDI_PAGE + 1, needs="avx"),
    case("64-byte load", "62f17c481007", f"rdi={RDI + 0xFE0}", RDI_PAGE, RDI_PAGE + 1, needs="avx512f"),
    case(
        "64-byte load with a scaled displacement",
        "62f17c48104701",
        f"rdi={RDI + 0xFE0}",
        RDI_PAGE + 1,
        needs="avx512f",
    ),
    case("broadcast", "c4e27d1807", f"rdi={RDI + 0xFFE}", RDI_PAGE, RDI_PAGE + 1, needs="avx"),
    case("masked store", "660f76c9660ff7c1", f"rdi={RDI + 0xFF8}", RDI_PAGE, RDI_PAGE + 1),
    case("x87 load", "db2f", f"rdi={RDI + 0xFF8}", RDI_PAGE, RDI_PAGE + 1),
    case("x87 state", "dd37", f"rdi={RDI + 0xFE0}", RDI_PAGE, RDI_PAGE + 1),
    case("SSE state", "0fae07", f"rdi={RDI + 0xF00}", RDI_PAGE, RDI_PAGE + 1),
    case("extended state", "0fae27", f"rdi={RDI + 0xF00} rax=7", RDI_PAGE, RDI_PAGE + 1, needs="xsave"),
]

KERNEL_CASES = [
    case("load", "488b07", f"rdi={RDI}", RDI_PAGE),
    case("load of 1 byte", "8a07", f"rdi={RDI + 0xFFF}", RDI_PAGE),
    case("load of 2 bytes across pages", "668b07", f"rdi={RDI + 0xFFF}", RDI_PAGE, RDI_PAGE + 1),
    case("store", "488907", f"rdi={RDI} rax=0x1122334455667788", RDI_PAGE),
    case("store of 4 bytes", "8907", f"rdi={RDI + 4} rax=0x55667788", RDI_PAGE),
    case("store across pages", "488907", f"rdi={RDI + 0xFFB} rax=0x1122334455667788", RDI_PAGE, RDI_PAGE + 1),
    case("read, change, write", "810744332211", f"rdi={RDI}", RDI_PAGE),
    case("exchange", "488707", f"rdi={RDI} rax=7", RDI_PAGE),
    case("push", "50", f"rsp={RSP} rax=7", RSP_PAGE - 1),
    case("pop", "58", f"rsp={RSP}", RSP_PAGE),
    case("move string", "f3a4", f"rdi={RDI} rsi={RSI} rcx=6", RDI_PAGE, RSI_PAGE),
    case("16-byte load", "0f1007", f"rdi={RDI}", RDI_PAGE),
]


@pytest.mark.parametrize("tried", USER_CASES, ids=lambda tried: tried.name)
def test_the_answer_is_what_the_instruction_touched(run: Callable[..., Outcome], tried: Case) -> None:
    skip_without(tried.needs)
    outcome = run(3, tried.code, tried.setup)
    assert outcome.problem == ""
    assert outcome.touched == tried.pages
    assert outcome.asked == outcome.touched
    assert outcome.same_registers
    assert outcome.same_memory
    assert outcome.bare > 0


@pytest.mark.parametrize("tried", KERNEL_CASES, ids=lambda tried: tried.name)
def test_at_cpl_0_the_guest_comes_out_the_same(run: Callable[..., Outcome], tried: Case) -> None:
    outcome = run(0, tried.code, tried.setup)
    assert outcome.problem == ""
    assert outcome.asked == outcome.touched == tried.pages
    assert outcome.same_registers
    assert outcome.same_memory


def test_emulated_code_gives_the_emulators_shapes(run: Callable[..., Outcome]) -> None:
    outcome = run(0, "488b07", f"rdi={RDI}")
    if outcome.bare:
        pytest.skip("code at CPL 0 is not emulated on this host")
    assert outcome.emulation == 1
    assert outcome.mmio == 1


def test_a_gather_is_refused_with_its_reason(run: Callable[..., Outcome]) -> None:
    skip_without("avx2")
    # All lanes of the mask on, all indices 0.
    outcome = run(3, "c5ed76d2" + "c5f5efc9" + "c4e26d92048f", f"rdi={RDI}")
    assert "gather" in outcome.problem
    assert outcome.asked == {0}


def test_page_tables_in_late_memory_work_through_the_pinned_set(run: Callable[..., Outcome]) -> None:
    outcome = run(3, "488b07", f"rdi={RDI} tables")
    assert outcome.problem == ""
    assert outcome.asked == {0, RDI_PAGE} | TABLE_PAGES
    assert outcome.same_registers
    assert outcome.same_memory


def test_touches_of_the_vmm_itself_come_as_events(run: Callable[..., Outcome]) -> None:
    outcome = run(3, "488b07", f"rdi={RDI}")
    assert outcome.events == set(range(64)) - outcome.asked


def test_a_vcpu_that_nobody_answers_can_be_kicked(run: Callable[..., Outcome]) -> None:
    outcome = run(3, "488b07", f"rdi={RDI} kick")
    assert outcome.problem == "interrupted"
    assert outcome.asked == {0}
