"""What a network costs: parameters, multiply-adds and bytes; latency; energy."""

from __future__ import annotations

from coldforge.measure.cost import count_macs, count_params, packed_bytes
from coldforge.measure.energy import energy_per_image, energy_source
from coldforge.measure.latency import Timing, measure_latency

__all__ = [
    "Timing",
    "count_macs",
    "count_params",
    "energy_per_image",
    "energy_source",
    "measure_latency",
    "packed_bytes",
]
