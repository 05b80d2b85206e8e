"""The runs of a folder, at a glance. Reads their small files only: no weights, and no torch."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from khanhllm.draw import visible
from khanhllm.errors import UserError
from khanhllm.files import read
from khanhllm.log.pictures import read_log
from khanhllm.settings import read_config
from khanhllm.units import as_size

Row = dict[str, Any]


def runs_in(folder: Path) -> list[Row]:
    """A row for the folder, if it is a run, or for each run inside it, the newest first. UserError if there is none."""
    try:
        inside = [folder, *(path for path in folder.iterdir() if path.is_dir())]
        found = [_row(run) for run in inside if (run / "config.toml").is_file()]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None
    if not found:
        raise UserError(f"{folder} holds no run; train one with: khanhllm train nano")
    return sorted(found, key=lambda row: str(row["changed"]), reverse=True)


def _row(run: Path) -> Row:
    files = list(_files(run))
    row: Row = {
        "run": run.resolve().name,
        "bytes": sum(status.st_size for status in files),
        "changed": f"{datetime.fromtimestamp(max((status.st_mtime for status in files), default=0)):%Y-%m-%d %H:%M}",
    }
    try:
        config = read_config(run)
        log = read_log(run / "training_log.csv", ("step", "loss", "val_bpb"))
        saved = [path for path in run.glob("checkpoints/step-*") if path.name[5:].isdecimal()]
        newest = max(saved, key=lambda path: int(path.name[5:]), default=None)
        _check_sizes(newest)
    except (UserError, OSError) as error:
        return row | {"fault": str(error)}
    model = config.model
    losses, bits = (log[name][np.isfinite(log[name])] for name in ("loss", "val_bpb"))
    asked = {"asked_seconds": config.train.seconds} if config.train.seconds else {"asked_steps": config.train.steps}
    known: Row = {"step": int(newest.name[5:]) if newest else 0}  # of a run that was saved without its log
    if len(losses):
        known = {"step": int(log["step"][-1]), "loss": float(losses[-1])}
    best = {"best_bpb": float(bits.min())} if len(bits) else {}
    return row | {"shape": f"{model.pattern}, width {model.dim}"} | asked | known | best


def _files(run: Path) -> Iterator[os.stat_result]:
    """What is known of each file, without those that a training removes meanwhile."""
    for folder, _, names in os.walk(run):
        for name in names:
            with suppress(FileNotFoundError):
                yield Path(folder, name).lstat()


def _check_sizes(newest: Path | None) -> None:
    """Raise UserError if a file of the newest checkpoint is cut or gone; to read every byte would take too long."""
    if newest is None:
        return
    try:
        manifest = json.loads(read(newest / "manifest.json"))
        for name, expected in manifest.items():
            if (newest / Path(name).name).stat().st_size != expected["bytes"]:
                raise UserError(f"{newest.name}/{name} is cut; an older checkpoint may be whole")
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{newest.name}/manifest.json is not a manifest; an older checkpoint may be whole") from None


def lines(rows: list[Row]) -> Iterator[str]:
    """Two short lines for each run, so that a narrow terminal shows them whole."""
    for row in rows:
        yield visible(f"{row['run']}  {row['changed']}  {as_size(row['bytes'])}")
        if "fault" in row:
            yield visible(f"  damaged: {row['fault']}")
            continue
        asked = f"/{row['asked_steps']:,}" if "asked_steps" in row else f" in {row['asked_seconds']:,.0f} s"
        loss = f", loss {row['loss']:.3f}" if "loss" in row else ""
        best = f", best {row['best_bpb']:.3f} bits per byte" if "best_bpb" in row else ""
        yield f"  {row['shape']}; step {row['step']:,}{asked}{loss}{best}"
