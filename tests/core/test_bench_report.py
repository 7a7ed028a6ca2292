"""The bench judges by its targets and writes what it measured, and nothing else, into the page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import report
from images import HALF, MIB, PAGE, SPARSE, write_image
from programs import Percentiles
from results import TARGETS, collect, for_last_line, judge
from rig import VARIANTS
from scenarios import (
    BULK_IMAGES,
    MIGRATIONS,
    PLACEMENTS,
    QUICK,
    SPARSE_GIB,
    THREADS,
    Measured,
    jain,
    jain_at_half,
)

FLOORS = ("floor", "floor_round_trip", "floor_local_fault")
KEYS = {
    "floor_us": {"p50", "p90", "p99"},
    "native_us": {"p50", "p90", "p99"},
    "grpcio_us": {"p50", "p90", "p99"},
    "native_tls_us": {"p50", "p90", "p99"},
    "native_busy_us": {"p50", "p90", "p99"},
    "demand_pages_s": {"native", "native_tls", "grpcio", "floor", "local_c"},
    "bulk_mib_s": {"native", "native_tls", "grpcio", "local_c"},
}


def a_result() -> dict[str, Any]:
    """Every repetition measured 2 of everything, but one that was disturbed."""
    measured = Measured()
    placed = [f"{name}.{where}" for name in (*FLOORS, *VARIANTS) for where in PLACEMENTS]
    for name in (*placed, "native_busy"):
        measured.percentiles[name] = [Percentiles(900, 900, 900), Percentiles(2, 2, 2), Percentiles(2, 2, 2)]
    names = [f"pages_s.{threads}.{name}" for threads in THREADS for name in (*VARIANTS, "floor", "local_c")]
    names += [f"bulk.{image}.{name}" for image in BULK_IMAGES for name in VARIANTS] + ["bulk.data.local_c"]
    for side in ("daemon", "page_server"):
        names += [f"{what}.{side}.{v}" for what in ("cpu", "rss", "peak", "anonymous") for v in VARIANTS]
    names += (
        [f"growth.{n}" for n in MIGRATIONS] + [f"sparse.{n}" for n in SPARSE_GIB] + ["jain", "busy_faults"]
    )
    for name in names:
        measured.numbers[name] = [2, 900, 2]
    measured.cdf_us["native"] = [1.0, 2.0]
    measured.timeline = [(0.0, 0.0), (1.0, 1.0)]
    return collect(measured, QUICK, quick=True, took_s=1.0)


def test_the_promised_keys_are_there_and_are_medians() -> None:
    result = a_result()
    for key, inner in KEYS.items():
        assert set(result[key]) == inner
        assert set(result[key].values()) == {2}
    assert result["cpu_s_per_gib"] == 4
    assert "rss_mib" in result


def test_the_last_line_leaves_out_what_only_pictures_need() -> None:
    result = a_result()
    assert set(result) - set(for_last_line(result)) == {"cdf_us", "timeline"}


def test_a_target_is_met_at_its_bound_and_missed_beyond_it() -> None:
    for target in TARGETS:
        assert target.is_met(target.bound)
        assert not target.is_met(target.bound * (0.99 if target.at_least else 1.01))


def test_what_is_missed_is_called_missed_on_the_page() -> None:
    result = a_result()
    result["native_us"]["p50"] = 100.0
    result["targets"] = judge(result)
    page = report.figures(result)
    assert "| p50: native / grpcio | ≤ 0.45 | 50 | missed |" in page
    assert "| p50: mTLS / plain | ≤ 1.5 | 0.02 | met |" in page


def test_only_measured_parts_of_the_page_change() -> None:
    page = "before\n<!-- measured: figures -->\nold\n<!-- end: figures -->\nafter\n"
    first = report.render(page, a_result())
    assert first.startswith("before\n<!-- measured: figures -->\n")
    assert first.endswith("<!-- end: figures -->\nafter\n")
    assert "old" not in first
    assert report.render(first, a_result()) == first


def test_a_part_that_nobody_makes_is_an_error() -> None:
    with pytest.raises(KeyError):
        report.render("<!-- measured: wishes -->\n<!-- end: wishes -->", a_result())


def test_the_page_has_the_part_that_a_run_fills() -> None:
    assert report.figures(a_result()) in report.render(report.PAGE.read_text(), a_result())


def test_fairness_is_judged_half_way_and_not_at_the_end() -> None:
    assert jain([5, 5, 5]) == 1
    assert jain([9, 0, 0]) == pytest.approx(1 / 3)
    assert jain_at_half([[0, 0], [10, 0], [10, 10]], pages=10) == pytest.approx(0.5)


def test_images_say_where_each_page_belongs_and_write_their_zeros(tmp_path: Path) -> None:
    write_image(tmp_path / "half", 2 * MIB, HALF)
    content = (tmp_path / "half").read_bytes()
    for page in range(2 * MIB // PAGE):
        word = int.from_bytes(content[page * PAGE : page * PAGE + 8], "little")
        assert word == (page + 1 if page % 32 < 16 else 0)
    assert (tmp_path / "half").stat().st_blocks * 512 >= 2 * MIB
    write_image(tmp_path / "sparse", 128 * MIB, SPARSE)
    assert (tmp_path / "sparse").stat().st_blocks * 512 < 64 * MIB
