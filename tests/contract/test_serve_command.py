"""`postcopyd serve` as a process: what it prints, when it ends, its ops endpoint, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from typing import TYPE_CHECKING

import aiohttp
import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from page_source_client import client, describe, fetch
from postcopyd.errors import Code, ConfigError
from postcopyd.source.cli import serve as command
from postcopyd.v1 import page_source_pb2 as pb
from source_support import PAGE, mixed_content, range_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT = mixed_content(4096, seed=21)


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    return path


async def start_command(*arguments: str) -> tuple[asyncio.subprocess.Process, dict[str, str]]:
    """Run `postcopyd serve` and return it with the event that it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from postcopyd.source.cli import serve; serve()",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        _, stderr = await process.communicate()
        raise AssertionError(stderr.decode())
    event: dict[str, str] = json.loads(line)
    assert event["event"] == "source.listening"
    return process, event


async def test_the_command_serves_until_all_images_are_released(image_path: Path) -> None:
    process, event = await start_command(
        "--image", f"a={image_path}", "--image", f"b={image_path}@9", "--listen", "127.0.0.1:0", "--once"
    )
    async with client(event["address"]) as stub:
        for name in ("a", "b"):
            image = await describe(stub, name)
            whole = range_of(1, 0, len(CONTENT))
            assert (await fetch(stub, image.epoch, [whole], name)).memory[1] == CONTENT
            await stub.Complete(pb.CompleteRequest(image_id=name, epoch=image.epoch))
    assert image.epoch == 9
    _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_command_ends_on_signals(image_path: Path, number: signal.Signals) -> None:
    process, event = await start_command("--image", f"vm={image_path}", "--listen", "127.0.0.1:0")
    async with client(event["address"]) as stub:
        await describe(stub)
    process.send_signal(number)
    _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()


async def test_the_ops_endpoint_tells_what_was_served(image_path: Path, tmp_path: Path) -> None:
    (tmp_path / "holes").write_bytes(bytes(64 * PAGE))
    process, event = await start_command(
        *("--image", f"vm={image_path}", "--image", f"zeros={tmp_path / 'holes'}"),
        *("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--max-streams", "3"),
    )
    url = f"http://{event['http']}"
    async with client(event["address"]) as stub, aiohttp.ClientSession() as session:
        epoch = (await describe(stub)).epoch
        collector = await fetch(stub, epoch, [range_of(1, 0, len(CONTENT))])
        zeros = await describe(stub, "zeros")
        await fetch(stub, zeros.epoch, [range_of(1, 0, 64 * PAGE)], "zeros")
        await stub.Complete(pb.CompleteRequest(image_id="zeros", epoch=zeros.epoch))
        async with session.get(f"{url}/metrics") as response:
            text = await response.text()
        assert samples_of(text) >= {
            ("postcopyd_source_image_bytes", "vm", "", float(len(CONTENT))),
            ("postcopyd_source_image_released", "vm", "", 0.0),
            ("postcopyd_source_image_released", "zeros", "", 1.0),
            ("postcopyd_source_served_bytes_total", "vm", "data", float(collector.data_bytes)),
            ("postcopyd_source_served_bytes_total", "zeros", "data", 0.0),
            ("postcopyd_source_served_bytes_total", "zeros", "zero", 64.0 * PAGE),
            ("postcopyd_source_streams_max", "", "", 3.0),
        }
        async with session.get(f"{url}/readyz") as response:
            assert response.status == 200
            assert await response.json() == {"ready": True, "images": {"vm": "served", "zeros": "released"}}
        async with session.get(f"{url}/healthz") as response:
            assert response.status == 200
    process.terminate()
    _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()


def samples_of(text: str) -> set[tuple[str, str, str, float]]:
    """(name, image, kind, value) of every sample."""
    return {
        (sample.name, sample.labels.get("image", ""), sample.labels.get("kind", ""), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def logs_put_back() -> Iterator[None]:
    """The command configures logs for a process of its own."""
    handlers = logging.root.handlers[:]
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers


def test_the_command_refuses_what_makes_no_sense(image_path: Path, logs_put_back: None) -> None:
    listen = ["--listen", "127.0.0.1:0"]
    cases = {
        ("--image", "vm=/nowhere"): Code.IMAGE_UNREADABLE,
        ("--image", "vm"): Code.ARGUMENT_INVALID,
        ("--image", f"vm={image_path}", "--once", "--keep"): Code.ARGUMENT_INVALID,
        ("--image", f"vm={image_path}", "--tls-cert", "x"): Code.ARGUMENT_INVALID,
        ("--image", f"vm={image_path}", "--tls-cert", "x", "--tls-key", "/nowhere"): Code.CONFIG_UNREADABLE,
        ("--image", f"vm={image_path}", "--max-message", "1"): Code.ARGUMENT_INVALID,
        ("--image", f"vm={image_path}", "--max-message", "1G"): Code.ARGUMENT_INVALID,
        ("--image", f"vm={image_path}", "--listen", "nowhere"): Code.ARGUMENT_INVALID,
        ("--image", f"vm={image_path}", "--http", "nowhere"): Code.ARGUMENT_INVALID,
    }
    for arguments, code in cases.items():
        with pytest.raises(ConfigError) as caught:
            command.main([*listen, *arguments], standalone_mode=False)
        assert caught.value.code is code, arguments
