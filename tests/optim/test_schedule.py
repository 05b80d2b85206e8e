from itertools import pairwise

import pytest

from khanhllm.optim.schedule import LEAST, factor, factor_at, warmup_of
from khanhllm.schema import ScheduleConfig
from khanhllm.settings import preset, preset_names, resolve


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
def test_a_short_run_warms_up_for_half_of_it_and_comes_down_again(kind):
    schedule = ScheduleConfig(kind=kind, warmup=100, floor=0.1)
    for steps in (30, 100, 199):
        factors = [factor(step, steps, schedule) for step in range(steps)]
        assert factors.index(1) == steps // 2 - 1 == warmup_of(steps, schedule) - 1
        assert factors[-1] == pytest.approx(0.1)


def test_the_warm_up_of_a_preset_is_as_long_as_it_says():
    for name in preset_names():
        chosen = resolve(preset(name))
        assert warmup_of(chosen.train.steps, chosen.schedule) == chosen.schedule.warmup or chosen.train.seconds, name


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_by_time_it_warms_up_and_ends_at_the_floor(kind):
    schedule = ScheduleConfig(kind=kind, warmup=100, floor=0.1, decay=0.3)
    factors = [factor_at(step / 1000, step, schedule) for step in range(1001)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[-1] == pytest.approx(0.1)
    assert max(factors) > 0.95
    assert all(a >= b for a, b in pairwise(factors[100:]))


def test_a_slow_machine_is_warm_before_a_twentieth_of_its_time_is_over():
    assert factor_at(0.05, 30, ScheduleConfig(kind="wsd", warmup=100)) == 1
    assert factor_at(0.02, 30, ScheduleConfig(kind="wsd", warmup=100)) == pytest.approx(0.4)


@pytest.mark.parametrize("warmup", [0, 10, 100])
def test_by_time_no_slow_step_skips_the_warm_up(warmup):
    """The first took half of the time, as it compiled, or the run is back at its beginning after so much of it."""
    schedule = ScheduleConfig(kind="wsd", warmup=warmup)
    steps = max(1, min(warmup, LEAST))
    for step in range(steps + 5):
        assert factor_at(0.5, step, schedule) == pytest.approx(min(1, (step + 1) / steps))
