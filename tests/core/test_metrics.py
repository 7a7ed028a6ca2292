"""Metrics and the HTTP endpoint, from status snapshots."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from postcopyd.errors import Code, ConfigError
from postcopyd.health.http import HttpServer
from postcopyd.health.readiness import Readiness
from postcopyd.metrics.collector import MAX_BUCKETS, Snapshot, SnapshotCollector
from postcopyd.metrics.counts import ErrorCounts
from postcopyd.metrics.exposition import Exposition
from postcopyd.status import MigrationStatus, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ALERTS = Path(__file__).resolve().parents[2] / "deploy" / "alerts.yml"
STATUS = MigrationStatus(
    id="vm-1",
    state=State.RECOVERING,
    socket_path="/s",
    sources=("a:1",),
    pages_total=100,
    pages_installed=60,
    pages_requested=15,
    faults=7,
    oldest_wait_us=2_500_000,
    memory_short=True,
    latency_log2_us=(1, 0, 2, 4),
    latency_sum_us=70,
)


def samples(text: str) -> dict[tuple[str, frozenset[str]], float]:
    """Every sample by its name and its label values but the migration's."""
    return {
        (
            sample.name,
            frozenset(value for key, value in sample.labels.items() if key != "migration"),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(*migrations: MigrationStatus, errors: ErrorCounts | None = None) -> str:
    counts = errors or ErrorCounts()
    snapshot = Snapshot(migrations, counts.snapshot())
    body, _ = await Exposition(lambda: SnapshotCollector(snapshot)).render("")
    return body.decode()


async def test_pages_by_state_add_up() -> None:
    values = samples(await scrape(STATUS))
    by_state = {
        state: values["postcopyd_pages", frozenset({state})]
        for state in ("installed", "requested", "missing")
    }
    assert by_state == {"installed": 60, "requested": 15, "missing": 25}


async def test_microseconds_become_seconds() -> None:
    values = samples(await scrape(STATUS))
    assert values["postcopyd_oldest_unanswered_fault_seconds", frozenset()] == 2.5
    assert values["postcopyd_fault_latency_seconds_sum", frozenset()] == pytest.approx(70e-6)


async def test_the_latency_histogram_is_cumulative() -> None:
    values = samples(await scrape(STATUS))
    buckets = {
        float(next(iter(labels))): value
        for (name, labels), value in values.items()
        if name == "postcopyd_fault_latency_seconds_bucket"
    }
    assert buckets == {2e-6: 1, 4e-6: 1, 8e-6: 3, 16e-6: 7, float("inf"): 7}
    assert values["postcopyd_fault_latency_seconds_count", frozenset()] == 7


async def test_very_long_latencies_make_no_more_buckets() -> None:
    text = await scrape(msgspec.structs.replace(STATUS, latency_log2_us=(1,) * 64))
    assert text.count("postcopyd_fault_latency_seconds_bucket{") == MAX_BUCKETS + 1
    assert samples(text)["postcopyd_fault_latency_seconds_count", frozenset()] == 64


async def test_a_migration_without_faults_has_an_empty_histogram() -> None:
    text = await scrape(MigrationStatus(id="vm-1", state=State.PREPARED, socket_path="/s", sources=()))
    assert samples(text)["postcopyd_fault_latency_seconds_count", frozenset()] == 0


async def test_every_state_has_a_series_even_when_no_migration_is_in_it() -> None:
    values = samples(await scrape(STATUS))
    assert {state: values["postcopyd_migrations", frozenset({state})] for state in State} == {
        state: float(state is State.RECOVERING) for state in State
    }


async def test_handoff_errors_are_counted_by_code() -> None:
    errors = ErrorCounts()
    for code in (Code.HANDOFF_NOT_JSON, Code.HANDOFF_NOT_JSON, Code.HANDOFF_TIMEOUT):
        errors.record(code)
    values = samples(await scrape(errors=errors))
    assert values["postcopyd_handoff_errors_total", frozenset({"handoff.not_json"})] == 2
    assert values["postcopyd_handoff_errors_total", frozenset({"handoff.timeout"})] == 1


async def test_alert_rules_use_metrics_that_exist() -> None:
    exposed = {name for name, _ in samples(await scrape(STATUS, errors=counted_once()))}
    used = set(re.findall(r"\bpostcopyd_[a-z_]+", ALERTS.read_text()))
    assert used
    assert used <= exposed


def counted_once() -> ErrorCounts:
    errors = ErrorCounts()
    errors.record(Code.HANDOFF_TIMEOUT)
    return errors


@pytest.fixture
async def http() -> AsyncIterator[tuple[str, Readiness]]:
    readiness = Readiness()
    exposition = Exposition(lambda: SnapshotCollector(Snapshot([STATUS], {})))
    server = HttpServer("127.0.0.1:0", lambda: readiness.report([STATUS]), exposition)
    await server.start()
    yield f"http://127.0.0.1:{server.port}", readiness
    await server.close()


async def test_readyz_says_why_not_and_lists_what_recovers(http: tuple[str, Readiness]) -> None:
    url, readiness = http
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/readyz") as response:
            assert response.status == 503
            assert list((await response.json())["reasons"]) == ["starting"]
        readiness.release("starting")
        async with session.get(f"{url}/readyz") as response:
            assert response.status == 200, "a migration that recovers does not make the daemon unready"
            assert (await response.json())["recovering"] == ["vm-1"]
        readiness.hold("stopping", "asked to stop")
        async with session.get(f"{url}/readyz") as response:
            assert response.status == 503


async def test_healthz_and_metrics_answer(http: tuple[str, Readiness]) -> None:
    url, _ = http
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/healthz") as response:
            assert response.status == 200
        async with session.get(f"{url}/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain")
            text = await response.text()
    assert "postcopyd_build_info{" in text
    assert "process_resident_memory_bytes" in text


async def test_concurrent_scrapes_are_answered_one_at_a_time() -> None:
    running, most = 0, 0

    def collect() -> SnapshotCollector:
        nonlocal running, most
        running += 1
        most = max(most, running)
        asyncio.get_running_loop().call_soon(finished)
        return SnapshotCollector(Snapshot([STATUS], {}))

    def finished() -> None:
        nonlocal running
        running -= 1

    exposition = Exposition(collect)
    await asyncio.gather(*(exposition.render("") for _ in range(5)))
    assert most == 1


async def test_an_address_in_use_is_a_configuration_error(http: tuple[str, Readiness]) -> None:
    url, readiness = http
    taken = url.removeprefix("http://")
    exposition = Exposition(lambda: SnapshotCollector(Snapshot([], {})))
    server = HttpServer(taken, lambda: readiness.report([]), exposition)
    with pytest.raises(ConfigError, match=f"http: {re.escape(taken)} cannot be bound"):
        await server.start()
    await server.close()
