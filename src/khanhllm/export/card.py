"""The model card: README.md of an exported folder."""

import math
from pathlib import Path

from khanhllm import __version__
from khanhllm.data.sources import components
from khanhllm.log.pictures import read_log
from khanhllm.model.counts import active_parameters, on_paper, total_parameters
from khanhllm.schema import Config, ModelConfig

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}"{more})
model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto"{more})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={new})[0]))
```"""


CONTINUES = "It continues text like that it learned from, and was not taught to answer questions or to refuse."
TALKS = (
    "It was tuned on conversations, whose form is the tokenizer's chat template, and knows no more than they and its "
    "first text said. It was not taught to refuse."
)


def card(
    run: Path,
    config: Config,
    exported: ModelConfig,
    step: int,
    tokens: int,
    dtype: str,
    checked: str,
    folder: str,
    remote: bool,
) -> str:
    """Markdown: what the model is, what it learned from, how good it is, what it cannot do, how to use it. tokens: as
    many as it had read by that step."""
    paper = on_paper(exported)
    model = exported
    kinds = f"{model.pattern.count('D')} dense and {model.pattern.count('M')} mixture layers"
    experts = (
        f", {model.experts} experts of which {model.experts_per_token} work on each token" if model.moe_layers else ""
    )
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [khanhllm, text-generation]",
        "---",
        f"# {run.resolve().name}",
        "",
        f"A language model, exported by KhanhLLM {__version__}: {total_parameters(paper):,} parameters, "
        f"{active_parameters(paper):,} at work on each token ({kinds}{experts}); width {model.dim}, "
        f"context {model.context:,} tokens, vocabulary {model.vocab_size:,}. Weights in {dtype}.",
        "",
        "## Training",
        _training(run, config, step, tokens),
        "",
        "## Is it the same model?",
        checked,
        "",
        "## Limits",
        TALKS if config.train.targets == "answers" else CONTINUES,
        "It repeats what its text says, errors and prejudice included. Texts longer than the context must be cut.",
        "In a prompt, transformers reads `<|endoftext|>` and the other special tokens as tokens; in training such "
        "letters were ordinary text. The tokenizer puts an `<|endoftext|>` before every text, as training did.",
        "",
        "## Use",
        USE.format(folder=folder, new=min(100, model.context // 2), more=", trust_remote_code=True" if remote else ""),
        "",
    ]
    return "\n".join(lines)


def _training(run: Path, config: Config, step: int, tokens: int) -> str:
    if not step:
        return "Not trained here: these are the weights that the run began with."
    # a path tells strangers whose machine it was
    source = config.data.source
    parts = source.split(", ") if len(components(source)) > 1 else [source]
    named = ", ".join(Path(part).name if Path(part).is_absolute() else part for part in parts)
    cleaned = f", cleaned by {config.data.clean}" if config.data.clean else ""
    return (
        f"Text: `{named}`{cleaned}. {step:,} optimizer steps, {tokens:,} tokens in all. {_figures(run, step)}"
    ).rstrip()


def _figures(run: Path, step: int) -> str:
    log = read_log(run / "training_log.csv", ("step", "val_bpb", "val_ce"))
    known = [
        (bits, nats)
        for at, bits, nats in zip(log["step"], log["val_bpb"], log["val_ce"], strict=True)
        if at <= step and math.isfinite(bits)
    ]
    if not known:
        return "It was not validated." if len(log["step"]) else ""  # saved without its log, it may have been
    return f"On text held out of it: {known[-1][0]:.3f} bits per byte ({known[-1][1]:.3f} nats per token)."
