"""A page server's counters as Prometheus metric families.

The labels are bounded by the images that the command line names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from postcopyd._native.image import Served
from postcopyd.metrics.collector import build_info

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prometheus_client.core import Metric

    from .service import PageSourceService


class ImageCounts(msgspec.Struct, frozen=True):
    """Of one image. `served`: answered so far, zeros as memory and not as sent."""

    id: str
    size_bytes: int
    is_released: bool
    served: Served


class SourceCollector:
    """A prometheus_client collector of one moment.

    Args:
        streams: page streams that are open.
        max_streams: how many may be.
    """

    def __init__(self, images: Sequence[ImageCounts], streams: int, max_streams: int) -> None:
        self._images = images
        self._streams = streams
        self._max_streams = max_streams

    @classmethod
    def of(cls, service: PageSourceService) -> SourceCollector:
        """Read the counters now."""
        images = [
            ImageCounts(image.id, image.file.size_bytes, image.file.is_released, image.file.served)
            for image in service.catalog
        ]
        return cls(images, len(service.streams), service.options.max_streams)

    def collect(self) -> Iterator[Metric]:
        yield build_info()
        yield GaugeMetricFamily("postcopyd_source_streams", "Page streams that are open.", self._streams)
        yield GaugeMetricFamily(
            "postcopyd_source_streams_max", "Page streams that may be open at once.", self._max_streams
        )
        size = GaugeMetricFamily("postcopyd_source_image_bytes", "Size of the image.", labels=["image"])
        released = GaugeMetricFamily(
            "postcopyd_source_image_released",
            "1: the destination has every page, and the image was let go.",
            labels=["image"],
        )
        served = CounterMetricFamily(
            "postcopyd_source_served_bytes",
            "Memory that was answered; zeros travel as their length alone.",
            labels=["image", "kind"],
        )
        for image in self._images:
            size.add_metric([image.id], image.size_bytes)
            released.add_metric([image.id], image.is_released)
            served.add_metric([image.id, "data"], image.served.data_bytes)
            served.add_metric([image.id, "zero"], image.served.zero_bytes)
        yield from (size, released, served)
