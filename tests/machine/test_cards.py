"""A card is found by the words that people and drivers use for it."""

import dataclasses

import pytest
import torch

from conftest import plain_machine
from khanhllm.errors import UserError
from khanhllm.machine import devices
from khanhllm.machine.cards import card, known_peak


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("4090", "RTX 4090"),
        ("rtx3060-8gb", "RTX 3060 8GB"),
        ("RTX 3060", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("A100", "A100 40GB"),
        ("a100 80gb", "A100 80GB"),
        ("L4", "L4"),
    ],
)
def test_a_card_by_its_words(words, found):
    assert card(words)[0] == found


@pytest.mark.parametrize(
    ("driver", "tflops"),
    [
        ("NVIDIA GeForce RTX 4070", 58),
        ("NVIDIA GeForce RTX 4070 SUPER", 71),
        ("NVIDIA GeForce RTX 4070 Ti", 80),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88),
        ("NVIDIA GeForce RTX 3060", 26),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_the_driver_names_a_card(driver, tflops):
    assert known_peak(driver) == tflops * 1e12


@pytest.mark.parametrize("driver", ["Tesla T4", "NVIDIA A10", "NVIDIA L40", "Apple M3"])
def test_a_card_of_another_name_has_no_peak(driver):
    assert known_peak(driver) is None


def test_an_unknown_card_is_one_line_that_guesses():
    with pytest.raises(UserError, match="did you mean RTX 4090"):
        card("RTX 4099")


@pytest.mark.parametrize(("precision", "products"), [("fp32", "highest"), ("bf16", "highest"), ("tf32", "high")])
def test_the_process_multiplies_as_the_machine_says(precision, products, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    dataclasses.replace(plain_machine(), precision=precision).take_process()
    assert asked == [products]


def test_a_machine_is_measured_once(monkeypatch):
    measured = []
    monkeypatch.setattr(devices, "_peak", lambda device: measured.append(device) or 1e12)
    machine = plain_machine()
    assert machine.peak_flops == machine.peak_flops == 1e12
    assert len(measured) == 1
