"""What llama.cpp computes from the files that we write."""

import os
import stat
import sys

import llama_cpp
import pytest
import tokenizers
import torch

from conftest import build, tiny
from khanhllm.cli import main
from khanhllm.data.tokenizer import SPECIALS, Tokenizer, train_tokenizer
from khanhllm.errors import UserError, missing_extra
from khanhllm.export import encode, gguf
from khanhllm.model import Transformer
from khanhllm.model.router import Router
from khanhllm.training.start import write_start

pytest.importorskip("gguf")

needs_llama = pytest.mark.skipif(bool(llama_cpp.missing(llama_cpp.NEW)), reason=llama_cpp.missing(llama_cpp.NEW))
needs_old = pytest.mark.skipif(bool(llama_cpp.missing(llama_cpp.OLD)), reason=llama_cpp.missing(llama_cpp.OLD))

SHAPES = {
    "DMDM": {"pattern": "DMDM"},
    "MDDM": {"pattern": "MDDM", "kv_heads": 2},
    "MMM": {"pattern": "MMM", "experts": 5, "experts_per_token": 3},
    "relu2": {"pattern": "DMD", "feedforward": "relu2"},
    "bias": {"pattern": "DMM", "router_bias": True, "rope_theta": 500.0},
    "relu2-bias": {"pattern": "MD", "feedforward": "relu2", "router_bias": True, "kv_heads": 1},
    "one": {"pattern": "DM", "experts_per_token": 1},
    "uneven": {"pattern": "DM", "hidden": 72, "expert_hidden": 24, "vocab_size": 333, "norm_eps": 1e-3},
    "dense": {"pattern": "DDD", "kv_heads": 2},
    "own values": {"pattern": "MDM", "kv_heads": 2, "value_embedding": "normed", "token_norm": True},
    "token shift": {"token_shift": True, "norm_eps": 1e-8},
    "scaled stream": {"value_embedding": "normed", "token_norm": True, "stream_scale": True, "norm_eps": 1e-8},
    "scaled bias": {"stream_scale": True, "router_bias": True, "norm_eps": 1e-8},
}
NO_EXPERTS = {"experts": 8, "experts_per_token": 2, "expert_hidden": 0}
"""what the keys of experts read as where there are none"""
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer((path.read_text("utf-8") for path in sorted(corpus.iterdir())), 300)


def example(shape, seed=2):
    """A model whose every part is heard in its logits: at the initial weights of a tiny one they are all but equal.

    Of six seeds, three have a token for which a router all but tossed a coin, and rounding decides otherwise.
    """
    model = build(tiny(**{"context": 256} | shape), seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tables" in name:
                parameter.normal_(generator=draw)
            elif name.endswith(("stream_L", "shift_LD")):
                parameter.uniform_(-0.8, 0.8, generator=draw)
            elif name.endswith("norm.weight"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
            elif name.startswith("blocks"):
                parameter.mul_(4 if "router" in name else 2)
        model.head.weight.mul_(3)
        for module in model.modules():
            if isinstance(module, Router) and module.bias_E is not None:
                module.bias_E.copy_(0.1 * torch.randn(len(module.bias_E), generator=draw))
    return model.eval()


def rebuilt(config, weights):
    model = Transformer(config)
    model.load_state_dict(dict(weights))
    return model.eval()


def architecture(config):
    return "hy_v3" if config.moe_layers else "qwen3"


def export(path, model, tokenizer, dtype="f32"):
    """The file, and its model in our code."""
    plain = encode.as_unscaled(*encode.as_divided(model.config, model.state_dict()))
    config, weights = encode.as_swiglu(*encode.as_deeper(*encode.as_wider(*plain)))
    gguf.write(path, config, weights, tokenizer, dtype, architecture(config), "example")
    return config, weights


def rows(count=2, length=64):
    return torch.randint(300, (count, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def greedy(model, ids, count):
    cache, new, written = model.new_cache(), ids, []
    for _ in range(count):
        new = [int(model.next_logits(torch.tensor([new]), cache).argmax())]
        written += new
    return written


def divergence(ours, theirs):
    """Mean KL divergence of the next token's distribution (nats)."""
    p, q = (torch.as_tensor(logits).double().log_softmax(-1) for logits in (ours, theirs))
    return float((p.exp() * (p - q)).sum(-1).mean())


@needs_llama
@each_shape
def test_in_fp32_the_logits_are_ours_and_so_is_the_text(tmp_path, tokenizer, shape):
    model, ids = example(shape), rows()
    export(tmp_path / "x.gguf", model, tokenizer)
    theirs = llama_cpp.ask(tmp_path / "x.gguf", ids=ids.tolist(), prompt=[0, 65, 66], greedy=100)
    with torch.inference_mode():
        ours = model.logits(ids)
    assert (ours - torch.from_numpy(theirs.logits)).abs().max() < 1e-4
    assert ours.std() > 0.5
    written = greedy(model, [0, 65, 66], 100)
    assert theirs.greedy == written
    assert len(set(written)) > 3  # no single token for ever


@needs_llama
@each_shape
def test_rounded_weights_move_the_distributions_little(tmp_path, tokenizer, shape):
    model, ids = example(shape), rows()
    for dtype in ("f16", "q8_0"):
        export(tmp_path / dtype, model, tokenizer, dtype)
    with torch.inference_mode():
        ours, rounded = model.logits(ids), rebuilt(*gguf.read(tmp_path / "q8_0")[:2]).logits(ids)
    half, eighth = (llama_cpp.ask(tmp_path / dtype, ids=ids.tolist()).logits for dtype in ("f16", "q8_0"))
    assert divergence(ours, half) < 1e-5
    assert divergence(rounded, eighth) < 1e-2


@needs_llama
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_squares_fit_into_half_precision(tmp_path, tokenizer, dtype):
    """llama.cpp computes products with f16 matrices in f16: of activations, too."""
    model, ids = example(SHAPES["relu2-bias"]), rows()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("up", "up.weight", "down", "down.weight")):
                parameter.mul_(6 if "up" in name else 1 / 36)
    export(tmp_path / "x.gguf", model, tokenizer, dtype)
    theirs = llama_cpp.ask(tmp_path / "x.gguf", ids=ids.tolist()).logits
    with torch.inference_mode():
        assert divergence(model.logits(ids), theirs) < {"f16": 1e-5, "q8_0": 1e-2}[dtype]


TEXTS = [
    "",
    " ",
    "\n\n  \t x   y\r\n\r\n",
    "Hello, it's 1234567 o'clock: I'LL we've DON'T 3.14 ½ ② ٣",
    "naïve Übermaß Ελλάδα Привет नमस्ते ภาษาไทย 日本語テキスト한국어 مرحبا שלום",
    "🙂👨‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u00a0\u2003\u200b\ufeff\u3000|",
    "<|endoftext|><|user|> <|end|> <|endof",
    "def f(x):\n\treturn {'a': [1, 2,\n        3]}  # !!!???\n" * 3,
    "a" * 300 + " " * 70 + "b",
    "\x00\x01\x1c\x1f\x7f\x85",
    "[PAD301]",
]


def of_gpt2(texts):
    """A tokenizer with the pattern that runs had before."""
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    return Tokenizer(learner.to_str())


@needs_llama
@pytest.mark.parametrize("train", [lambda texts: train_tokenizer(texts, 700), of_gpt2], ids=["usual", "gpt-2"])
def test_text_has_the_same_ids_and_its_end_is_known(tmp_path, train):
    tokenizer = train(TEXTS * 5)
    export(tmp_path / "x.gguf", example({"pattern": "DM", "vocab_size": 710}), tokenizer)
    theirs = llama_cpp.ask(tmp_path / "x.gguf", texts=TEXTS)
    for text, ids in zip(TEXTS, theirs.ids, strict=True):
        assert ids == [tokenizer.end_of_text, *tokenizer.encode(text)], text
    assert (theirs.bos, theirs.eos, theirs.add_bos, theirs.add_eos) == (0, 0, True, False)
    assert {tokenizer.decode([token]) for token in theirs.controls} == set(SPECIALS)
    assert {tokenizer.decode([end]) for end in theirs.ends} == {"<|endoftext|>", "<|end|>"}  # the latter by its name


@needs_old
def test_the_compatible_form_runs_in_a_release_without_our_architecture(tmp_path, tokenizer):
    model, ids = example({"pattern": "DMD", "feedforward": "relu2"}), rows()
    config, weights = encode.as_mixtures(*encode.as_swiglu(model.config, model.state_dict()))
    gguf.write(tmp_path / "x.gguf", config, weights, tokenizer, "f32", "qwen3moe", "example")
    theirs = llama_cpp.ask(tmp_path / "x.gguf", llama_cpp.OLD, ids=ids.tolist(), prompt=[0], greedy=100, texts=TEXTS)
    with torch.inference_mode():
        assert (model.logits(ids) - torch.from_numpy(theirs.logits)).abs().max() < 1e-4
    assert theirs.greedy == greedy(model, [0], 100)
    assert theirs.ids == [[0, *tokenizer.encode(text)] for text in TEXTS]
    export(tmp_path / "usual.gguf", model, tokenizer)
    with pytest.raises(RuntimeError, match="unknown model architecture: 'hy_v3'"):
        llama_cpp.ask(tmp_path / "usual.gguf", llama_cpp.OLD)


def _rope(config, weights):
    return config.model_copy(update={"rope_theta": config.rope_theta * 1.1}), weights


def _one_number(config, weights):
    wrong = weights["blocks.1.feedforward.experts.up"].clone()
    wrong[0, 3, 5] += 0.5
    return config, weights | {"blocks.1.feedforward.experts.up": wrong}


def _swapped(config, weights):
    gate, up = (f"blocks.1.feedforward.experts.{part}" for part in ("gate", "up"))
    return config, weights | {gate: weights[up], up: weights[gate]}


@needs_llama
@pytest.mark.parametrize("fault", [_rope, _one_number, _swapped])
def test_one_fault_is_seen_in_their_logits(tmp_path, tokenizer, fault):
    model, ids = example(SHAPES["DMDM"]), rows()
    config, weights = fault(model.config, model.state_dict())
    gguf.write(tmp_path / "x.gguf", config, weights, tokenizer, "f32", "hy_v3", "example")
    theirs = llama_cpp.ask(tmp_path / "x.gguf", ids=ids.tolist()).logits
    with torch.inference_mode():
        assert (model.logits(ids) - torch.from_numpy(theirs)).abs().max() > 1e-4


@needs_llama
@pytest.mark.parametrize("feedforward", ["swiglu", "relu2"])
def test_their_own_quantization_to_four_bits_runs(tmp_path, tokenizer, feedforward):
    shape = {"pattern": "DM", "dim": 256, "hidden": 512, "expert_hidden": 256, "feedforward": feedforward}
    model, ids = example(shape), rows()
    export(tmp_path / "x.gguf", model, tokenizer, "f16")
    llama_cpp.ask(tmp_path / "x.gguf", quantize=llama_cpp.Q4_K_M, to=str(tmp_path / "q4.gguf"))
    theirs = llama_cpp.ask(tmp_path / "q4.gguf", ids=ids.tolist())
    assert "Q4_K" in theirs.description
    assert (tmp_path / "q4.gguf").stat().st_size < 0.4 * (tmp_path / "x.gguf").stat().st_size
    with torch.inference_mode():
        assert divergence(model.logits(ids), theirs.logits) < 0.1


@each_shape
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_what_was_written_reads_back(tmp_path, tokenizer, shape, dtype):
    config, weights = export(tmp_path / "x.gguf", example(shape), tokenizer, dtype)
    found = gguf.read(tmp_path / "x.gguf")
    kept = config if config.moe_layers else config.model_copy(update=NO_EXPERTS)
    assert found.model == kept
    assert (found.tokens, found.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert found.weights.keys() == weights.keys()
    for name, weight in weights.items():
        rounded = dtype == "bf16" and weight.ndim > 1 and "router" not in name
        assert torch.equal(found.weights[name], weight.bfloat16().float() if rounded else weight), name


def test_bf16_weights_are_written_exactly(tmp_path, tokenizer):
    model = example(SHAPES["DMDM"]).bfloat16()
    export(tmp_path / "x.gguf", model, tokenizer, "bf16")
    weights = gguf.read(tmp_path / "x.gguf").weights
    assert all(torch.equal(weights[name], weight.float()) for name, weight in model.state_dict().items())


def test_numbers_beyond_f16_are_refused_and_leave_no_file(tmp_path, tokenizer):
    model = example(SHAPES["DMDM"])
    with torch.no_grad():
        model.blocks[2].attention.out.weight[0, 0] = 7e4
    with pytest.raises(UserError, match=r"^blk\.2\.attn_output\.weight holds numbers beyond the range of f16"):
        export(tmp_path / "x.gguf", model, tokenizer, "f16")
    assert not list(tmp_path.iterdir())


def test_it_is_a_new_file_with_the_usual_rights(tmp_path, tokenizer):
    target, link = tmp_path / "precious", tmp_path / "x.gguf"
    target.write_text("precious")
    link.symlink_to(target)
    model = example({"pattern": "D"})
    with pytest.raises(FileExistsError):
        export(link, model, tokenizer)
    assert target.read_text() == "precious"
    before = os.umask(0o027)
    try:
        export(tmp_path / "y.gguf", model, tokenizer)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "y.gguf").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("shape", "name", "said"),
    [
        ({"style": "classic"}, "hy_v3", "model.style is classic, which llama.cpp's hy_v3 cannot express"),
        ({"pattern": "MM", "router_bias": True}, "qwen3moe", "model.router_bias is true"),
        ({"pattern": "MM", "experts_per_token": 1}, "qwen3moe", "model.experts_per_token is 1"),
    ],
)
def test_a_shape_that_the_architecture_does_not_have_is_refused(tmp_path, tokenizer, shape, name, said):
    model = build(tiny(**shape))
    with pytest.raises(UserError, match=said):
        gguf.write(tmp_path / "x.gguf", model.config, model.state_dict(), tokenizer, "f32", name, "example")


def test_biased_routers_leave_without_compatible_and_the_refusal_says_so(tmp_path, tokenizer, capsys):
    model = example(SHAPES["bias"])
    write_start(tmp_path / "run", tiny().model_copy(update={"model": model.config}), model, tokenizer)
    words = ["export", str(tmp_path / "run"), "--to", "gguf", "--out", str(tmp_path / "x.gguf")]
    assert main([*words, "--compatible"]) == 2
    assert capsys.readouterr().err.endswith("(it knows only false); without --compatible GGUF has it\n")
    assert main(words) == 0


def test_without_the_extra_its_name_is_told(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError) as error:
        export(tmp_path / "x.gguf", example({"pattern": "D"}), tokenizer)
    assert str(missing_extra(error.value)).endswith("pip install 'khanhllm[export]'")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_model_is_refused_not_misread(tmp_path, tokenizer):
    whole = tmp_path / "x.gguf"
    export(whole, example(SHAPES["DMDM"]), tokenizer)
    data = whole.read_bytes()
    faults = {
        "is not a GGUF file": data[: len(data) // 2],
        "unknown here; known: hy_v3": data.replace(b"hy_v3", b"hy_v9"),
        "expert_gating_func is None": data.replace(b"expert_gating_func", b"expert_gating_fund"),
        "add_bos_token is None": data.replace(b"add_bos_token", b"add_bas_token"),
        "no tensor like blk.1.ffn_up_shexp": _with_shared_expert(whole),
    }
    for said, content in faults.items():
        (tmp_path / "y.gguf").write_bytes(content)
        with pytest.raises(UserError, match=said):
            gguf.read(tmp_path / "y.gguf")
    with pytest.raises(UserError, match="cannot read"):
        gguf.read(tmp_path / "none.gguf")


def _with_shared_expert(path):
    """The file, with one number in a shared expert that is not zero."""
    from gguf import GGUFReader

    reader = GGUFReader(path, "c")
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up_shexp.weight")
    tensor.data[0, 0] = 1
    return reader.data.tobytes()
