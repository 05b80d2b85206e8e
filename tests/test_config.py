import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny
from khanhllm.errors import UserError, missing_extra
from khanhllm.files import publish
from khanhllm.model.counts import active_parameters, on_paper, total_parameters
from khanhllm.schema import Config
from khanhllm.settings import (
    preset,
    preset_names,
    read_config,
    read_toml,
    resolve,
    to_toml,
    with_length,
    write_config,
)
from khanhllm.units import amount, seconds


def test_a_number_for_the_micro_batch_keeps_the_rows_of_a_step():
    rows = resolve(preset("card-12gb")).train.rows_per_step
    given = resolve(preset("card-12gb"), {"train": {"micro_batch": "8"}}).train
    assert (given.micro_batch, given.rows_per_step) == (8, rows)
    with pytest.raises(UserError, match=f"a step has {rows} rows, no multiple of 7; give train.accumulation too"):
        resolve(preset("card-12gb"), {"train": {"micro_batch": 7}})
    assert resolve(preset("card-12gb"), {"train": {"micro_batch": 7, "accumulation": 2}}).train.rows_per_step == 14


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_survive_the_run_folder(name):
    config = resolve(preset(name))
    assert resolve(tomllib.loads(to_toml(config))) == config


def test_reference_preset_to_the_letter():
    config = resolve(preset("khanh-692m"))
    assert total_parameters(on_paper(config.model)) == 692_196_352
    assert (config.model.experts, config.model.experts_per_token, config.train.accumulation) == (8, 2, 64)
    assert config.optim.name == "adamw8bit"


def test_sizes_of_the_others():
    size = {name: on_paper(resolve(preset(name)).model) for name in preset_names()}
    assert total_parameters(size["modern-692m"]) == pytest.approx(692_196_352, rel=0.001)
    assert total_parameters(size["mini"]) == pytest.approx(25e6, rel=0.05)
    assert active_parameters(size["small"]) == pytest.approx(125e6, rel=0.03)


@given(st.text())
def test_any_text_survives_toml(text):
    config = resolve({"train": {"sample_prompt": text.encode("utf-8", "replace").decode()}})
    assert resolve(tomllib.loads(to_toml(config))) == config


def test_a_text_of_many_dots_survives_the_run_folder(tmp_path):
    config = resolve({"train": {"sample_prompt": 'She said "' + "." * 3_000}})
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": {"dmi": 3}}, "unknown key model.dmi (did you mean dim?)"),
        ({"trian": {}}, "unknown key trian (did you mean train?)"),
        ({"optim": {"lr": "nan"}}, "optim.lr"),
        ({"optim": {"lr": -1}}, "must be more than 0 "),
        ({"train": {"steps": "many"}}, "train.steps"),
        ({"train": {"steps": True}}, "train.steps: must be a whole number, such as 1000 or 10k (got 'true')"),
        ({"optim": {"lr": False}}, "optim.lr: must be a number (got 'false')"),
        ({"train": {"seconds": 1e305}}, "train.seconds: must be at most 1,000,000,000"),
        ({"train": 5}, "train"),
        ({"model": {"heads": 3}}, "multiple of heads"),
        ({"model": {"experts_per_token": 9}}, "exceeds experts"),
        ({"model": {"pattern": "DXM"}}, "model.pattern"),
        ({"optim": {"name": "sgd"}}, "adamw8bit"),
        ({"machine": {"expert_processes": 3}}, "machine.expert_processes (3) must divide the experts of a layer (8)"),
        ({"machine": {"expert_processes": 2}, "model": {"pattern": "DD"}}, "the experts of a layer (0)"),
        ({"machine": {"expert_processes": 2, "shares": "2,1"}}, "leave shares empty"),
    ],
)
def test_a_wrong_key_is_one_line_that_names_it(settings, says):
    with pytest.raises(UserError) as error:
        resolve(settings)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_mixture_layers_asks_nothing_of_experts():
    model = resolve({"model": {"pattern": "DD", "experts": 1}}).model
    assert active_parameters(on_paper(model)) == total_parameters(on_paper(model))


KEYS = [(section, key) for section, values in Config() for key, _ in values]
JUNK = st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers()))


@given(st.sampled_from(KEYS), JUNK)
def test_any_junk_is_accepted_or_refused_in_one_line(key, junk):
    section, name = key
    try:
        config = resolve({section: {name: junk}})
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert resolve(tomllib.loads(to_toml(config))) == config


def test_a_config_cannot_change():
    with pytest.raises(Exception, match="frozen"):
        tiny().train.steps = 5


@pytest.mark.parametrize(
    ("text", "expected"), [("480s", 480), ("90m", 5400), ("8h", 28800), ("1d12h", 129600), ("1.5H", 5400)]
)
def test_times(text, expected):
    assert seconds(text, "time") == expected


@pytest.mark.parametrize("text", ["", "8", "h", "8 hours", "-1h", "1h-2m", "nan"])
def test_what_is_no_time(text):
    with pytest.raises(UserError, match="480s"):
        seconds(text, "time")


def test_amounts():
    assert [amount(text, "tokens") for text in ("5B", "300m", "1_000", "1.5k")] == [5 * 10**9, 3 * 10**8, 1000, 1500]
    with pytest.raises(UserError, match="5B"):
        amount("many", "tokens")


@pytest.mark.parametrize("length", [{"steps": 5}, {"tokens": "5k"}])
def test_a_length_in_steps_or_tokens_replaces_a_time(length):
    assert with_length({"train": {"seconds": 60}}, **length, where="").train.seconds == 0


def test_steps_replace_the_time_of_the_layers_before_but_not_of_their_own():
    hour = {"train": {"seconds": 3600}}
    assert resolve(hour, {"train": {"steps": 5}}).train.seconds == 0
    assert resolve({"train": {"steps": 5}}, hour).train.seconds == 3600
    assert resolve({"train": {"steps": 5, "seconds": 3600}}).train.seconds == 3600


def test_what_cannot_be_published_leaves_nothing_aside(tmp_path):
    (tmp_path / "taken").mkdir()  # no file takes the place of a folder
    with pytest.raises(OSError):
        publish(tmp_path / "taken", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_part_of_a_missing_module_names_its_extra():
    missing = missing_extra(ModuleNotFoundError("No module named 'pyarrow.parquet'", name="pyarrow.parquet"))
    assert "khanhllm[data]" in str(missing)
    assert missing_extra(ModuleNotFoundError("No module named 'ours'", name="ours")) is None


@pytest.mark.parametrize("text", ["[train]\nsteps = 3.5", "[train]\nstepz = 3", "train = 5"])
def test_a_wrong_key_is_told_with_the_file_that_holds_it(tmp_path, text):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.toml: .*train"):
        read_toml(tmp_path / "mine.toml")


def test_keys_that_need_those_of_other_layers_are_not_judged_alone(tmp_path):
    (tmp_path / "mine.toml").write_text("[model]\ndim = 96\nheads = 3\n[optim]\nlr = 1")
    assert read_toml(tmp_path / "mine.toml") == {"model": {"dim": 96, "heads": 3}, "optim": {"lr": 1}}
    (tmp_path / "mine.toml").write_text("[model]\nheads = 3")
    assert read_toml(tmp_path / "mine.toml") == {"model": {"heads": 3}}
