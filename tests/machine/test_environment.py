"""What other programs leave in the environment is refused in one line."""

import pytest

from khanhllm.errors import UserError
from khanhllm.machine import launch
from khanhllm.machine.group import opened
from khanhllm.schema import MachineConfig

PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("known", "named"),
    [
        ({"WORLD_SIZE": "2", **PLACE}, "no RANK"),
        ({"WORLD_SIZE": "2", "RANK": "x", **PLACE}, "RANK='x'"),
        ({"WORLD_SIZE": "2", "RANK": "5", **PLACE}, "RANK='5'.* 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "no MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "no MASTER_PORT"),
    ],
)
def test_half_an_environment_is_refused(monkeypatch, known, named):
    for name in ("WORLD_SIZE", "RANK", *PLACE):
        monkeypatch.delenv(name, raising=False)
    for name, value in known.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{named}.*torchrun"), opened(MachineConfig()):
        pass


def test_the_launcher_refuses_it_too(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(UserError, match="WORLD_SIZE='abc'"):
        launch.wanted(MachineConfig(processes=2))
