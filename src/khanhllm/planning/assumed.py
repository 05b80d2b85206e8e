"""What a plan for several cards assumes, as nobody has measured it there, and where each figure comes from."""

import re
from typing import NamedTuple

from khanhllm.errors import UserError


class Assumed(NamedTuple):
    """A share between 0 and 1."""

    share: float
    source: str


MIXTURE = Assumed(0.2, "mixtures on many cards reach 12 to 24 %, as Megatron-Bridge 25.11 and torchtitan#1993 report")
"""share of its peak rate at which a card trains a mixture"""
HIDDEN = Assumed(0.5, "not measured; the weights of the next block arrive while a block computes")
"""share of the arithmetic in which sharded weights arrive. All else is waited for"""
HOST = Assumed(0.4, "through the host's memory, where 20 to 40 % of the line rate are reported")
NVLINK = Assumed(0.82, "of an H100, where NCCL reaches 370 of 450 GB/s: nccl-tests#212")
NETWORK = Assumed(0.9, "90 % of the line rate")
GIVEN = Assumed(1.0, "as you say")
LANES = {3: 0.985, 4: 1.97, 5: 3.94}
"""GB/s each way of one lane of PCIe, by generation"""
LINES = {
    **{f"PCIe {gen} x{lanes}": (lanes * rate, HOST) for gen, rate in LANES.items() for lanes in (4, 8, 16)},
    "NVLink": (450.0, NVLINK),
    **{f"{gbits:g} GbE": (gbits / 8, NETWORK) for gbits in (1, 2.5, 10, 25, 100)},
    "400 Gb InfiniBand": (400 / 8, NETWORK),
}
"""line rate each way (GB/s), and how much of it a card gets"""
UNITS = {"GB": 1e9, "MB": 1e6, "Gb": 1e9 / 8, "Gbit": 1e9 / 8, "Mb": 1e6 / 8, "Mbit": 1e6 / 8}


class Link(NamedTuple):
    """What joins the cards."""

    name: str
    speed: float
    """bytes a second that a card gets while it gives as many"""
    why: Assumed


def link(given: str) -> Link:
    """The link of this name ("PCIe 4 x8", "10gbe") or speed ("6 GB/s"). Raises UserError if it is not known."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([GM](?:B|b|bit))/s\s*", given)
    if match and float(match[1]):
        return Link(given.strip(), float(match[1]) * UNITS[match[2]], GIVEN)
    for name, (rate, why) in LINES.items():
        if _plain(name) == _plain(given):
            return Link(name, rate * 1e9 * why.share, why)
    raise UserError(f"--link: {given[:60]!r} is not known; known are {', '.join(LINES)}, or a speed, as '6 GB/s'")


def _plain(name: str) -> str:
    """The name as it is compared: "PCI-E 4.0 x8", "pcie gen4 x8" -> "pcie4x8"."""
    return re.sub(r"[\s_-]+|gen|\.0(?!\d)", "", name.lower())
