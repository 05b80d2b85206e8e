from itertools import pairwise

import pytest

from khanhllm.optim.schedule import factor, factor_at
from khanhllm.schema import ScheduleConfig


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_warms_up_to_the_peak_and_ends_at_the_floor(kind):
    schedule = ScheduleConfig(kind=kind, warmup=10, floor=0.1)
    factors = [factor(step, 100, schedule) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == 1
    assert factors[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[9:]))


def test_wsd_holds_the_peak_until_its_decay():
    schedule = ScheduleConfig(kind="wsd", warmup=10, decay=0.2)
    assert {factor(step, 100, schedule) for step in range(9, 80)} == {1.0}
    assert factor(80, 100, schedule) < 1


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_runs_shorter_than_their_warm_up(kind, steps):
    assert all(0 < factor(step, steps, ScheduleConfig(kind=kind, warmup=100)) <= 1 for step in range(steps))


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_by_time_it_warms_up_and_ends_at_the_floor(kind):
    schedule = ScheduleConfig(kind=kind, warmup=100, floor=0.1, decay=0.3)
    factors = [factor_at(step / 1000, step, schedule) for step in range(1001)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[-1] == pytest.approx(0.1)
    assert max(factors) > 0.95
    assert all(a >= b for a, b in pairwise(factors[100:]))


def test_a_slow_machine_is_warm_before_a_twentieth_of_its_time_is_over():
    assert factor_at(0.05, 3, ScheduleConfig(kind="wsd", warmup=100)) == 1
