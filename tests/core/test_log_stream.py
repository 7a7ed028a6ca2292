"""Logs that cannot be written neither stop nor delay anybody."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING

from postcopyd.log_stream import LogStream

if TYPE_CHECKING:
    from pathlib import Path

LINE = json.dumps({"event": "x" * 1000}) + "\n"


def fill(stream: LogStream, lines: int) -> None:
    for _ in range(lines):
        stream.write(LINE)


def test_lines_arrive_whole(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as file:
        stream = LogStream(file.fileno())
        fill(stream, 3)
        file.seek(0)
        assert file.read() == LINE * 3


def test_a_pipe_that_nobody_reads_costs_lines_and_the_next_one_says_how_many() -> None:
    read_end, write_end = os.pipe()
    stream = LogStream(write_end)
    fill(stream, 100)
    with os.fdopen(read_end) as reader:
        kept = 0
        os.set_blocking(read_end, False)
        while line := reader.readline():
            assert line == LINE
            kept += 1
        stream.write(LINE)
        assert json.loads(reader.readline())["lines"] == 100 - kept > 0
        assert reader.readline() == LINE
        # The end that others write to blocks them as before.
        assert os.get_blocking(write_end)
        os.close(write_end)


def test_a_socket_that_nobody_reads_does_not_block() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fill(LogStream(ours.fileno()), 2000)
        assert theirs.recv(len(LINE)) == LINE.encode()


def test_a_reader_that_went_away_is_no_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        fill(LogStream(ours.fileno()), 2)


def test_a_full_disk_is_no_error() -> None:
    with open("/dev/full", "w") as full:
        fill(LogStream(full.fileno()), 2)
