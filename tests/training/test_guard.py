import random
from math import inf, nan
from statistics import median

import pytest

from khanhllm.log.alarms import DEAD, STEPS, Alarms
from khanhllm.schema import GuardConfig, ModelConfig
from khanhllm.training.guard import LEAST, WINDOW, Guard

CONFIG = GuardConfig()


def after(losses, guard=None):
    guard = guard or Guard()
    for loss in losses:
        assert not guard.fault(loss, 1.0, CONFIG), loss
        guard = guard.accept(loss, 0)
    return guard


def falling(steps, seed=0):
    """A loss as trainings have it: a fall like a power law, with noise."""
    chance = random.Random(seed)
    return [2 + 8 * (step + 1) ** -0.3 + chance.gauss(0, 0.1) for step in range(steps)]


def test_ten_thousand_clean_steps_are_all_accepted():
    after(falling(10_000))


def test_a_single_loss_far_above_is_rejected():
    guard = after(falling(500))
    assert "far above" in guard.fault(guard.losses[-1] * 10, 1.0, CONFIG)
    assert not guard.fault(guard.losses[-1] * 10, 1.0, GuardConfig(spike=0))


def test_steady_losses_do_not_make_it_touchy():
    assert not after([3.0] * WINDOW).fault(3.9, 1.0, CONFIG)
    assert after([3.0] * WINDOW).fault(4.1, 1.0, CONFIG)


def test_nothing_is_a_spike_before_enough_losses_are_known():
    assert not after(falling(LEAST - 1)).fault(1e4, 1.0, CONFIG)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_what_is_not_finite_is_always_rejected(bad):
    for guard in (Guard(), after(falling(200))):
        assert "loss" in guard.fault(bad, 1.0, CONFIG)
        assert "gradient" in guard.fault(3.0, bad, CONFIG)
        assert guard.fault(bad, bad, GuardConfig(spike=0))


def test_rejected_losses_never_enter_the_window():
    guard = after(falling(200))
    for _ in range(50):
        guard = guard.reject()
    assert (guard.rejected, guard.losses) == (50, after(falling(200)).losses)
    assert guard.fault(1e4, 1.0, CONFIG)


def test_returns_are_forgotten_after_a_calm_stretch():
    guard = after(falling(WINDOW - 1), Guard(returns=2))
    assert guard.returns == 2
    assert guard.accept(3.0, 0).returns == 0


def test_one_rejection_after_a_return_is_no_doubt_whatever_was_rejected_before():
    saved = Guard(losses=(1.0,) * 50, spikes=LEAST - 1, accepted=5)
    assert saved.reject().doubts(CONFIG)
    assert not saved.returned_to(1).reject().doubts(CONFIG)
    assert saved.returned_to(2).returns == 2


def test_a_rise_is_the_texts_if_known_rows_are_read_as_well_as_before():
    guard = after(falling(500))
    level = median(guard.losses)
    assert guard.text_changed(level + 4, level - 0.2)
    assert guard.text_changed(level + 4, level + 1.9)
    assert not guard.text_changed(level + 4, level + 2.1)
    assert not guard.text_changed(level + 4, nan)
    assert not Guard().text_changed(9.0, 2.0)


def test_after_a_change_of_text_the_new_level_is_believed_and_a_rise_above_it_is_not():
    guard = after(falling(500)).reject().reject().reject()
    moved = guard.moved(8.0)
    assert (moved.rejected, moved.spikes, median(moved.losses)) == (0, 0, pytest.approx(8.0))
    assert not moved.fault(8.5, 1.0, CONFIG)
    assert moved.fault(20.0, 1.0, CONFIG)
    after([8.0 - 0.04 * step for step in range(150)], moved)


def test_a_text_that_comes_and_goes_is_doubted_too():
    """Else its rows would be rejected for ever: they never come often enough in a row."""
    guard = after(falling(500))
    for _ in range(LEAST):
        assert not guard.doubts(CONFIG)
        guard = guard.accept(guard.losses[-1], 0).reject()
    assert guard.doubts(CONFIG)
    assert after([guard.losses[-1]] * LEAST, guard).spikes == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 2 * WINDOW])
def test_the_middle_of_the_losses_is_an_accepted_step_s_however_rejections_lie(steps):
    """Steps of four rows; every second one is rejected, and after the last a return has passed a thousand rows."""
    guard = Guard()
    for step in range(steps):
        guard = guard.accept(float(step), 8 * step).reject()
    middle = guard.middle(8 * steps + 1000, 4)
    assert middle % 8 == 0
    assert abs(median(guard.losses) - middle / 8) <= 0.5


def test_a_middle_that_was_not_noted_is_counted_back():
    """The guard of an older checkpoint; once enough steps have followed, it is noted."""
    old = Guard(losses=(3.0,) * 5, rejected=3)
    assert old.middle(32, 4) == 32 - (3 + 3) * 4
    assert Guard(losses=(3.0,)).reject().middle(8, 4) == 0
    assert Guard(losses=(3.0,)).reject().middle(4, 4) == 0
    assert after([3.0] * 5, Guard(losses=(3.0,) * 5)).cursors == (0,) * 5
    for cursor in (1000, 1004, 1008, 1012, 1016, 1020):
        old = old.accept(3.0, cursor)
    assert old.middle(9999, 4) == 1000
    assert old.moved(9.0).middle(9999, 4) == 1000


def rows(shares, balance):
    return {"load_per_layer": [shares], "balance_per_layer": [balance]}


def test_an_idle_expert_is_said_once_until_it_has_been_at_work_again():
    alarms = Alarms([1], ModelConfig(experts=4))
    idle, busy = rows([0.5, 0.3, 0.19, 0.01], 1.2), rows([0.25] * 4, 1.0)
    heard = [text for _ in range(3 * STEPS) for text in alarms.check(idle)]
    assert len(heard) == 1
    assert "layer 1: expert 3" in heard[0]
    assert "--loss.balance" in heard[0]
    assert not list(alarms.check(busy))
    assert len([text for _ in range(STEPS) for text in alarms.check(idle)]) == 1


def test_a_collapse_is_said_and_an_even_layer_is_not():
    alarms = Alarms([3], ModelConfig(experts=8))
    heard = [text for _ in range(STEPS) for text in alarms.check(rows([0.5, 0.5, *[0.0] * 6], 4.0))]
    assert any("collapsed" in text for text in heard)
    assert not [text for _ in range(2 * STEPS) for text in Alarms([3], ModelConfig()).check(rows([0.125] * 8, 1.0))]
    one = Alarms([3], ModelConfig(experts=2, experts_per_token=2))
    assert not [text for _ in range(2 * STEPS) for text in one.check(rows([0.5, 0.5], 1.0000001))]


def test_a_gradient_of_exactly_zero_is_said_once():
    for shape in (ModelConfig(), ModelConfig(pattern="DD")):
        alarms = Alarms(shape.moe_layers, shape)
        assert not [text for _ in range(DEAD) for text in alarms.check({"grad_norm": 1e-9})]
        heard = [text for _ in range(3 * DEAD) for text in alarms.check({"grad_norm": 0.0})]
        assert len(heard) == 1
        assert "--optim.lr" in heard[0]
