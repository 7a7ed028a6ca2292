"""A short run of the VMM socket's fuzz targets; a long one is `FUZZ_SECONDS=3600 pytest tests/fuzz`."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from postcopyd.handoff.exit_frames import LENGTH, FaultRequest, encode_json_request, encode_request
from postcopyd.units import Gpa, Hva, Offset
from postcopyd.vmm.handoff_client import HandoffFormat, Region, encode

TARGET = Path(__file__).with_name("fuzz_socket.py")
SECONDS = int(os.environ.get("FUZZ_SECONDS", "4"))

REGIONS = [
    Region(Hva(0x7F0000000000), 2 << 20, Offset(0), Gpa(4 << 30)),
    Region(Hva(0x7F0000200000), 4 << 20, Offset(2 << 20), Gpa(5 << 30)),
]


def handoffs() -> list[bytes]:
    plain = [encode(fmt, REGIONS, page_size) for fmt in HandoffFormat for page_size in (4096, 2 << 20)]
    return [*plain, with_everything()]


def with_everything() -> bytes:
    """A framed hand-off with every field that there is."""
    region = {
        "guest_phys_addr": 0,
        "host_virt_addr": 0x7F0000000000,
        "size": 2 << 20,
        "backing_file_offset": 0,
        "page_size": 4096,
    }
    body = msgspec.json.encode(
        {
            "type": "handoff",
            "version": 0,
            "vmm_pid": 7,
            "mode": "MISSING|MINOR",
            "regions": [region],
            "descriptors": ["uffd", "memfd", "state", "bitmap", "guest_memfd"],
            "pinned": [{"guest_phys_addr": 0, "size": 4096}],
            "keep_state": True,
        }
    )
    return struct.pack("<I", len(body)) + body


def requests() -> list[bytes]:
    asked = [
        FaultRequest(vcpu=0, offset=0, flags=0, gpa=0),
        FaultRequest(vcpu=70000, offset=1 << 40, flags=8, gpa=None),
        FaultRequest(vcpu=3, offset=300, flags=1 << 33, gpa=1 << 20),
    ]
    framed = [LENGTH.pack(len(payload)) + payload for payload in map(encode_request, asked)]
    texts = [encode_json_request(request) for request in asked]
    return [b"".join(framed), b"".join(texts), framed[0] + texts[1] + framed[2]]


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(("target", "messages"), [("handoff", handoffs()), ("exits", requests())])
def test_no_vmm_breaks_its_socket(target: str, messages: list[bytes], tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: make fuzz")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, message in enumerate(messages):
        for step in (0, 6, 255):
            (corpus / f"{number}-{step}").write_bytes(bytes([step]) + message)
    limits = ["-seed=1", f"-max_total_time={SECONDS}", "-max_len=4096", "-timeout=5", "-rss_limit_mb=1024"]
    done = subprocess.run(
        [sys.executable, str(TARGET), target, *limits, str(corpus)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
