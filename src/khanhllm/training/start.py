"""A run at step 0 whose model is not a random one: it was made of another run, or came from elsewhere."""

import shutil
from pathlib import Path
from typing import Any

from khanhllm import optim
from khanhllm.data.tokenizer import Tokenizer
from khanhllm.errors import UserError
from khanhllm.model import Transformer, losses
from khanhllm.schema import Config
from khanhllm.settings import write_config
from khanhllm.training import checkpoint


def write_start(out: Path, config: Config, model: Transformer, tokenizer: Tokenizer, **state: Any) -> None:
    """Write the folder `out`, in which `khanhllm train --resume` begins with this model and fresh moments.

    state: what the checkpoint notes of the data (cursor, data, folder), if it goes on with what another run read.
    Raises UserError if it cannot be written.
    """
    load_LE = losses.even_load(len(config.model.moe_layers), config.model.experts)
    noted = {"cursor": 0, "seconds": 0.0, "load": load_LE.tolist(), "tokenizer": tokenizer.sha256}
    noted |= {"model": config.model.model_dump(), **state}
    optimizer = optim.build(model, config.optim, config.train.seed)
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write(out, checkpoint.snapshot(0, model, optimizer, noted))
        tokenizer.save(out / "tokenizer.json")
        write_config(config, out)
    except (OSError, UserError) as error:
        if made:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
