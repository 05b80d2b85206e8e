"""Read, merge, check and write configurations.

Values come from a preset (a TOML file, chosen by its name), perhaps a TOML file of the user's, and perhaps
`--section.key value` on the command line; later ones win. The run folder keeps the resolved `config.toml`, and that
file alone reproduces a run that began with random weights.
"""

import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from khanhllm.errors import UserError
from khanhllm.explain import did_you_mean, explain
from khanhllm.files import publish, read, there
from khanhllm.schema import Config, Section
from khanhllm.units import amount, seconds

PRESETS = Path(__file__).parent / "presets"
LONGEST = 2**18
"""largest config that is read (bytes)"""
DEEPEST = 1000
"""most dots in a line; the time to read a.b.c... grows with their square"""
NO_NAMES: Mapping[str, str] = {}
TYPED = {"steps": "--steps", "time": "--for", "tokens": "--tokens"}
"""what the command line calls the lengths of a training"""


def preset_names() -> list[str]:
    """The names of all presets, in alphabetical order."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset, as read from its TOML file."""
    if name not in preset_names():
        raise UserError(
            f"no preset named {name!r}{did_you_mean(name, preset_names())}; known: {', '.join(preset_names())}"
        )
    return read_toml(PRESETS / f"{name}.toml")


def settings_of(name: str | Path) -> dict[str, Any]:
    """The settings of a preset, a TOML file or a run folder. Raises UserError."""
    path = Path(name)
    if path.suffix == ".toml":
        return read_toml(path)
    if str(name) not in preset_names() and there(kept := path / "config.toml"):
        return read_toml(kept)
    return preset(str(name))


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a TOML file. Raises UserError if it cannot be read, is not valid TOML, or holds a key that is
    wrong by itself; whether its keys fit together shows with the other layers."""
    try:
        text = read(path, LONGEST).decode("utf-8-sig")  # editors on Windows put a byte order mark first
        if any(line.count(".") > DEEPEST for line in text.splitlines()):
            raise RecursionError
        settings = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid TOML: {str(error)[:200]}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid TOML: it is nested too deep") from None
    try:
        Config.model_validate(settings)
    except ValidationError as error:
        if error.errors()[0]["type"] != "value_error":  # as our checks of several keys raise
            raise UserError(f"{path}: {explain(error, Config, NO_NAMES)}") from None
    return settings


def resolve(*layers: Mapping[str, Any], where: str = "config", names: Mapping[str, str] = NO_NAMES) -> Config:
    """Merge settings, of which later ones win, and check them. Values may be strings, as from a command line.

    names: what the user calls a key, for errors, as in {"train.steps": "--steps"}.
    """
    merged: dict[str, Any] = {}
    for layer in (_completed(merged, layer, where) for layer in layers):
        for section, values in layer.items():
            both = isinstance(values, Mapping) and isinstance(merged.get(section), Mapping)
            merged[section] = {**merged[section], **values} if both else values
    return checked(Config, merged, where, names)


def with_length(
    *layers: Mapping[str, Any],
    steps: Any = None,
    time: Any = None,
    tokens: Any = None,
    where: str,
    names: Mapping[str, str] = TYPED,
) -> Config:
    """`resolve` with a length of training: optimizer steps, a time such as 8h, or tokens such as 300M. At most one of
    them; it replaces the length in the layers. names: what the user calls the three."""
    if sum(value is not None for value in (steps, time, tokens)) > 1:
        raise UserError(f"give one of {names['steps']}, {names['time']} and {names['tokens']}")
    if time is not None:
        length: dict[str, Any] = {"seconds": seconds(time, names["time"])}
    elif tokens is not None:
        a_step = resolve(*layers, where=where).tokens_per_step
        length = {"steps": -(-amount(tokens, names["tokens"]) // a_step)}
    elif steps is not None:
        length = {"steps": steps}
    else:
        return resolve(*layers, where=where)
    called = {"train.steps": names["steps" if tokens is None else "tokens"], "train.seconds": names["time"]}
    return resolve(*layers, {"train": length}, where=where, names=called)


def _completed(before: Mapping[str, Any], layer: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A layer with what its [train] says of keys of the layers before it. steps alone replace their seconds, which
    always go before steps; micro_batch to or from "auto", without accumulation, keeps their rows per step."""
    train = layer.get("train")
    if not isinstance(train, Mapping):
        return layer
    implied: dict[str, Any] = {}
    if "steps" in train and "seconds" not in train:
        implied["seconds"] = 0
    size, had = train.get("micro_batch"), before.get("train", {}).get("micro_batch")
    if size is not None and "auto" in (size, had) and "accumulation" not in train:
        rows = checked(Config, {"train": before.get("train", {})}, where).train.rows_per_step
        size = checked(Config, {"train": {"micro_batch": size}}, where).train.micro_batch
        implied["accumulation"], left = divmod(rows, 1 if size == "auto" else size)
        if left:
            raise UserError(f"{where}: a step has {rows} rows, no multiple of {size}; give train.accumulation too")
    return {**layer, "train": {**train, **implied}}


Kind = TypeVar("Kind", bound=Section)


def checked(kind: type[Kind], settings: Mapping[str, Any], where: str, names: Mapping[str, str] = NO_NAMES) -> Kind:
    """The settings as a `kind`. Raises UserError that names the first wrong key, as `names` calls it."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, kind, names)}") from None


def nested(dotted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"optim.lr": 1e-3} -> {"optim": {"lr": 1e-3}}. Raises UserError for a name without a dot."""
    settings: dict[str, dict[str, Any]] = {}
    for name, value in dotted.items():
        section, dot, key = name.partition(".")
        if not dot:
            raise UserError(f"unknown argument {name}; keys of the config have a dot, as in {{'optim.lr': 1e-3}}")
        settings.setdefault(section, {})[key] = value
    return settings


def to_toml(config: Config) -> str:
    """The whole resolved config as TOML, each key with its explanation, readable by `read_toml`."""
    lines = []
    for section, values in config:
        lines.append(f"[{section}]")
        fields = type(values).model_fields
        for key, value in values:
            lines.append(f"# {' '.join((fields[key].description or '').split())}")
            lines.append(f"{key} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: str | bool | int | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = "".join(_escape(char) for char in value)
        if text.count(".") > DEEPEST:  # `read_toml` would take them for a hostile key
            text = text.replace(".", "\\U0000002E")
        return f'"{text}"'
    return repr(value)


def _escape(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else f"\\U{ord(char):08X}"


def read_config(run: Path) -> Config:
    """The config of a run folder. Raises UserError if it is not one."""
    file = run / "config.toml"
    if not file.exists():
        hint = _like(run) or "; train one with: khanhllm train nano"
        raise UserError(f"{run} is not a run folder (it has no config.toml){hint}")
    return resolve(read_toml(file), where=str(file))


def _like(run: Path) -> str:
    """The run that may be meant, in parentheses: nano is runs/nano."""
    with suppress(OSError):
        for place in (run.parent, run.parent / "runs"):
            runs = [str(place / path.parent.name) for path in place.glob("*/config.toml")]
            if hint := did_you_mean(str(place / run.name), runs):
                return hint
    return ""


def other_shape(name: str, folder: Path) -> str:
    """One line if a run that is resumed has another shape than the preset that was named, which is left aside."""
    ours, theirs = read_config(folder).model, resolve(preset(name)).model
    for key, has in ours:
        if has != (would := getattr(theirs, key)):
            what = f"its model.{key} is {has}, not {would}"
            return f"{folder} continues with its own config, not with preset {name}: {what}"
    return ""


def folder_for(name: str) -> Path:
    """The run folder for a preset or TOML file if none is named: runs/NAME; a run's own for its config.toml."""
    kept = Path(name)
    if kept.name == "config.toml" and there(kept.with_name("training_log.csv")):
        return kept.parent
    return Path("runs") / kept.stem


def write_config(config: Config, folder: Path) -> None:
    """Replace the run's config.toml, in one rename. Raises UserError."""
    try:
        publish(folder / "config.toml", to_toml(config))
    except OSError as error:
        raise UserError(f"cannot write {folder / 'config.toml'}: {error.strerror}") from None


def beside(run: str | Path, ending: str) -> Path:
    """The folder of a run that is made of this one, if none is named: RUN-chat, also for a RUN of "." or ".."."""
    folder = Path(run)
    return Path(f"{folder if folder.name.strip('.') else folder.resolve()}{ending}")


def holds_run(folder: Path) -> bool:
    """Whether there is something to lose: a config, or a checkpoint that was written to its end."""
    checkpoints = folder.glob("checkpoints/step-*")
    return (folder / "config.toml").exists() or any(path.suffix != ".tmp" for path in checkpoints)


def nothing_to_resume(folder: Path, way: str) -> UserError:
    """What to say of a folder without a config. way: how a new run is begun."""
    if holds_run(folder):
        way = "it has checkpoints, but no config.toml; bring that back, or remove the folder"
    return UserError(f"{folder} holds no run to resume; {way}")


def refuse_to_overwrite(folder: Path, resume: bool) -> None:
    """Raise UserError if the folder holds a run that the user does not ask to resume."""
    if not resume and holds_run(folder):
        raise UserError(f"{folder} already holds a run; continue it with --resume, or choose another with --run")
