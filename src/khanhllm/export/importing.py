"""A Qwen3 or Qwen3-MoE folder becomes a run at step 0, to look into or to train further."""

from pathlib import Path

from khanhllm.errors import UserError
from khanhllm.export import encode, hf
from khanhllm.export.check import assembled
from khanhllm.files import check_new, quoted
from khanhllm.schema import Config
from khanhllm.settings import resolve
from khanhllm.training.start import write_start


def import_model(folder: Path, out: Path, context: int | None = None) -> Config:
    """Write `out`, a run at step 0 with the weights of a folder that transformers can load, and return its config.

    context: what the model sees at once (tokens), if not all that it could. Raises UserError, naming the key, for a
    model that ours cannot be.
    """
    check_new(out)
    found, tokenizer = hf.read(folder), hf.read_tokenizer(folder)
    if context and context > found.model.context:
        raise UserError(f"--context {context} is more than the {found.model.context} tokens that the model can see")
    for name, weight in found.weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{folder}: {name} holds numbers that are not finite; its weights are broken")
    shape = found.model.model_dump() | ({"context": context} if context else {})
    data = {"tokenizer": str((out / "tokenizer.json").resolve())}
    config = resolve({"model": shape, "data": data}, where="import")
    write_start(out, config, assembled(config.model, found.weights), tokenizer)
    if encode.widened(found.weights):
        form = "value_embedding or token_shift in a form that training destroys"
        print(f"{out}: to look into. It has {form}: to go on training, take the run that was exported")
    else:
        print(f"{out}: to train it further, khanhllm train --resume --run {quoted(out)} --data SRC --steps N")
    return config
