"""Graphics cards by name: their memory and their speed, as their makers publish it.

Speed is dense bf16 throughput with fp32 accumulation (TFLOP/s); on GeForce cards it is half of the fp16 figure.
"""

import re
from typing import NamedTuple

from khanhllm.errors import UserError
from khanhllm.explain import did_you_mean


class Card(NamedTuple):
    """What a plan needs to know of a graphics card."""

    memory: float
    """GB (10^9 bytes), the driver's share included"""
    tflops: float


CARDS = {
    "RTX 3060 12GB": Card(12.9, 26),
    "RTX 3060 8GB": Card(8.6, 26),
    "RTX 3060 Ti": Card(8.6, 32),
    "RTX 3070": Card(8.6, 41),
    "RTX 3070 Ti": Card(8.6, 43),
    "RTX 3080 10GB": Card(10.7, 60),
    "RTX 3080 12GB": Card(12.9, 61),
    "RTX 3080 Ti": Card(12.9, 68),
    "RTX 3090": Card(25.8, 71),
    "RTX 3090 Ti": Card(25.8, 80),
    "RTX 4060": Card(8.6, 30),
    "RTX 4060 Ti 8GB": Card(8.6, 44),
    "RTX 4060 Ti 16GB": Card(17.2, 44),
    "RTX 4070": Card(12.9, 58),
    "RTX 4070 SUPER": Card(12.9, 71),
    "RTX 4070 Ti": Card(12.9, 80),
    "RTX 4070 Ti SUPER": Card(17.2, 88),
    "RTX 4080": Card(17.2, 97),
    "RTX 4080 SUPER": Card(17.2, 104),
    "RTX 4090": Card(25.8, 165),
    "RTX 5060": Card(8.6, 38),
    "RTX 5060 Ti 8GB": Card(8.6, 47),
    "RTX 5060 Ti 16GB": Card(17.2, 47),
    "RTX 5070": Card(12.9, 62),
    "RTX 5070 Ti": Card(17.2, 88),
    "RTX 5080": Card(17.2, 113),
    "RTX 5090": Card(34.4, 209),
    "RTX A6000": Card(51.5, 155),
    "L4": Card(24.2, 121),
    "L40S": Card(48.3, 362),
    "A100 40GB": Card(42.9, 312),
    "A100 80GB": Card(85.9, 312),
    "H100": Card(85.5, 989),
    "H200": Card(150.8, 989),
}


def card(name: str) -> tuple[str, Card]:
    """The card that a user names ("4090", "rtx3060-8gb", "A100"); if several sizes match, the first."""
    wanted = _plain(name)
    fits = [known for known in CARDS if _plain(known) == wanted] or [k for k in CARDS if _model(k) == wanted]
    if not fits:
        plain = {_plain(known): known for known in CARDS}
        guess = did_you_mean(wanted, list(plain)) if wanted else ""
        for short, known in plain.items():
            guess = guess.replace(f"mean {short}?", f"mean {known}?")
        raise UserError(f"no card named {name!r} is known{guess}; give its memory instead: --memory 12GB")
    return fits[0], CARDS[fits[0]]


def known_peak(device_name: str) -> float | None:
    """Matrix throughput (FLOP/s) of a card by its driver name, as "NVIDIA GeForce RTX 4090"; None if unknown."""
    words = _plain(re.sub(r"\d+GB.*", "", device_name))
    fits = [known for known in CARDS if re.match(rf"{_model(known)}(?!\d)", words)]
    return CARDS[max(fits, key=lambda known: len(_model(known)))].tflops * 1e12 if fits else None


def _plain(name: str) -> str:
    """The name without the words that users often omit: "RTX 4060 Ti 16GB" -> "4060ti16gb"."""
    return re.sub(r"nvidia|geforce|rtx|gpu|[\s_-]+", "", name.lower())


def _model(known: str) -> str:
    """The plain name without its memory."""
    return _plain(re.sub(r" \d+GB$", "", known))
