"""Calculated bytes on each device, and bytes it sends in a step, for each way to shard a model.

docs/devices.md shows the table; tests/transforms/test_processes.py checks the formulas against
compiled programs at small sizes. python -m benchmarks.devices
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks import report


class Mode(NamedTuple):
    """Bytes per parameter: `whole` is replicated, and `spread` is split over the devices.

    A step reduces `reduced` bytes of gradients, and gathers `gathered` bytes.
    """

    whole: float
    spread: float
    reduced: float
    gathered: float

    def kept(self, parameters: float, devices: int) -> float:
        """Return the bytes of parameters, gradients, and state on a device."""
        return parameters * (self.whole + self.spread / devices)

    def moved(self, parameters: float, devices: int) -> float:
        """Return the bytes that a device sends in a step: in a ring, all but one share."""
        return parameters * (self.reduced + self.gathered) * (devices - 1) / devices


INT8 = 2.07  # bytes of state per parameter: two int8 moments, scales, and small float32 leaves
MODES = {
    "data parallel, float32": Mode(whole=4 + 4 + 8, spread=0, reduced=4, gathered=4),
    "zero1, float32": Mode(whole=4 + 4, spread=8, reduced=4, gathered=4),
    "zero1, bf16, 24 bits, int8, update": Mode(2 + 2, spread=1 + INT8, reduced=2, gathered=4),
    "zero1, bf16, 24 bits, int8, apply": Mode(2 + 2, spread=1 + INT8, reduced=2, gathered=2),
    "FSDP, float32": Mode(whole=0, spread=4 + 4 + 8, reduced=4, gathered=8),
    "FSDP, bf16, 24 bits, int8": Mode(whole=0, spread=2 + 2 + 1 + INT8, reduced=2, gathered=4),
}
SIZES, DEVICES = (7e9, 70e9), (8, 64, 256, 1024)


def main() -> None:
    rows = []
    for name, mode in MODES.items():
        for parameters in SIZES:
            on = {f"GB on each of {n}": f"{mode.kept(parameters, n) / 1e9:.1f}" for n in DEVICES}
            sent = f"{mode.moved(parameters, DEVICES[-1]) / 1e9:.0f}"
            size = f"{parameters / 1e9:.0f}B"
            rows.append({"mode": name, "parameters": size, **on, "GB sent in a step": sent})
    report.write("devices", rows)


if __name__ == "__main__":
    main()
