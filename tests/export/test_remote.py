"""The code that travels with an exported model computes what ours does."""

import inspect
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import build, plain_machine, tiny
from khanhllm.cli import main
from khanhllm.data.tokenizer import train_tokenizer
from khanhllm.export import remote
from khanhllm.export.encode import as_unscaled
from khanhllm.export.remote import FILES, UNKNOWN
from khanhllm.inference.generate import continuation
from khanhllm.schema import ModelConfig, Sampling
from khanhllm.training.start import write_start

transformers = pytest.importorskip("transformers")

EVERYTHING = {
    "pattern": "MDMDM",
    "kv_heads": 2,
    "feedforward": "relu2",
    "value_embedding": True,
    "token_shift": True,
    "embedding_skip": True,
    "pair_embedding": 97,
    "router_bias": True,
}
SHAPES = {
    "classic": {"style": "classic", "pattern": "DMDM"},
    "classic, one expert each": {"style": "classic", "experts_per_token": 1, "kv_heads": 1},
    "all dense": {"pattern": "DD"},
    "one expert each": {"experts_per_token": 1},
    "one wide expert": {"experts": 1, "experts_per_token": 1, "expert_hidden": 0},
    "a start that can copy": {"induction_head": True},
    "rope and eps": {"rope_theta": 123.0, "norm_eps": 0.01},
    "normed values": {"value_embedding": "normed"},
    "values in one of three": {"pattern": "DMDMD", "value_embedding": True, "value_every": 3},
    **{key: {key: value} for key, value in EVERYTHING.items()},
    "everything": EVERYTHING,
}
BOTH = pytest.mark.parametrize("shape", [SHAPES["classic"], EVERYTHING], ids=["classic", "everything"])
TOKENIZER = train_tokenizer(["the code that travels with the model"], 270)


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory):
    """transformers imports the code from a copy in its cache, here one that goes with the test."""
    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield


def ours(shape):
    """Our model in which every tensor matters, with logits of about 1."""
    model = build(tiny(**{"context": 96, **shape}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "_E", "_L", "_LD")) or "norm" in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
            elif "pair" in name or "tables" in name:
                tensor.normal_(0, 0.2, generator=generator)
            elif "router" in name:
                tensor.mul_(10)
        model.head.weight.div_(model.logits(some_ids()).std())
    return model.eval()


def some_ids(rows=3, length=60):
    return torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(2))


def export(model, folder):
    folder.mkdir()
    remote.write(folder, model.config, model.state_dict(), TOKENIZER, "f32")
    found = remote.read(folder)
    assert found.model == model.config.model_copy(update=dict.fromkeys(UNKNOWN, False))
    assert found.weights.keys() == model.state_dict().keys()
    return folder


def load(folder, **options):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report.values()), report  # missing, unexpected, mismatched
    return model.eval()


@pytest.fixture
def pair(shape, tmp_path):
    """Our model, and the same out of a folder."""
    model = ours(shape)
    return model, load(export(model, tmp_path / "exported"))


def close(one, other):
    return (one - other).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_ours(pair):
    model, theirs = pair
    assert theirs.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        logits = model.logits(some_ids())
        assert 0.5 < logits.std() < 2
        assert close(theirs(some_ids()).logits, logits)
        assert close(theirs(some_ids()[:1]).logits, logits[:1])
        assert close(theirs(some_ids(), use_cache=False, logits_to_keep=2).logits, logits[:, -2:])


@BOTH
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(pair):
    model, theirs = pair
    ids = some_ids(2, 20)
    ids[0, :7] = 55  # a token like any other, which only the mask tells from the text
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    logits = theirs(ids, attention_mask=mask).logits
    assert close(logits[0, 7:], model.logits(ids[:1, 7:])[0])
    assert close(logits[1], model.logits(ids[1:])[0])
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        texts = theirs.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0, **options)
        for row, start in ((0, 7), (1, 0)):
            assert texts[row, start:].tolist() == greedy(model, ids[row, start:].tolist(), 9)


@BOTH
@torch.no_grad()
def test_with_the_cache_as_without(pair):
    model, theirs = pair
    ids, cache, pieces = some_ids(), None, []
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 30), (30, 60)):  # a text, single tokens, and several at once
        before = ids[:, start - 1 : end - 1] if start else None
        out = theirs(ids[:, start:end], past_key_values=cache, before_ids=before)
        cache, pieces = out.past_key_values, [*pieces, out.logits]
    assert close(torch.cat(pieces, dim=1), model.logits(ids))


@pytest.mark.parametrize("shape", [EVERYTHING], ids=["everything"])
@torch.no_grad()
def test_a_pair_without_its_first_token_is_refused(pair):
    ids = some_ids()
    out = pair[1](ids[:, :5])
    with pytest.raises(ValueError, match="pass before_ids"):
        pair[1](ids[:, 5:6], past_key_values=out.past_key_values)


@pytest.mark.parametrize("shape", [EVERYTHING], ids=["everything"])
@torch.no_grad()
def test_texts_packed_into_one_row_know_nothing_of_each_other(pair):
    model, theirs = pair
    ids = some_ids(1, 30)
    position = torch.cat((torch.arange(12), torch.arange(18)))[None]
    logits = theirs(ids, position_ids=position, use_cache=False).logits
    assert close(logits, torch.cat((model.logits(ids[:, :12]), model.logits(ids[:, 12:])), dim=1))


def greedy(model, ids, count):
    sampling = Sampling(tokens=count, temperature=0.0)
    return ids + list(continuation(model, ids, sampling, plain_machine(), model.config.vocab_size))


@BOTH
def test_greedy_text_is_ours(pair):
    model, theirs = pair
    ids = some_ids(1, 6)
    wanted = greedy(model, ids[0].tolist(), 50)
    settings = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for options in ({}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}):
        assert theirs.generate(ids, **settings, **options)[0].tolist() == wanted
    beams = [theirs.generate(ids, **settings, num_beams=3, use_cache=cached)[0].tolist() for cached in (True, False)]
    assert beams[0] == beams[1]


@BOTH
def test_loss_and_gradients_are_ours(pair):
    model, theirs = pair
    ids = some_ids()
    nll_BT, _ = model.train()(ids[:, :-1], ids[:, 1:])
    nll_BT.mean().backward()
    theirs.train().gradient_checkpointing_enable()
    out = theirs(ids, labels=ids, use_cache=False)
    assert close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert close(out.loss, nll_BT.mean())
    assert close(theirs(ids, labels=ids, num_items_in_batch=7).loss, nll_BT.sum() / 7)
    out.loss.backward()
    mine = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert torch.allclose(parameter.grad, mine[name].grad, atol=1e-5, rtol=1e-3), name


@BOTH
@torch.no_grad()
def test_saved_and_loaded_again_it_is_the_same(pair, tmp_path):
    _, theirs = pair
    theirs.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(some_ids()).logits, theirs(some_ids()).logits)
    assert {path.name for path in FILES} <= {path.name for path in (tmp_path / "again").iterdir()}


@BOTH
@torch.no_grad()
def test_other_types_and_attentions(pair, tmp_path):
    model, theirs = pair
    logits, folder = model.logits(some_ids()), tmp_path / "exported"
    assert close(load(folder, attn_implementation="eager")(some_ids()).logits, logits)
    half = load(folder, dtype=torch.bfloat16)
    router = {name: tensor.dtype for name, tensor in half.state_dict().items() if ".router." in name}
    assert set(router.values()) == {torch.float32}
    assert half.head.weight.dtype == torch.bfloat16
    for rounded in (half(some_ids()).logits, autocast(theirs, some_ids()).logits):
        assert (rounded - logits).abs().mean() < 0.05
    router = theirs.blocks[model.config.moe_layers[0]].feedforward.router
    x_ND = torch.randn(64, 32)
    assert torch.equal(autocast(router, x_ND)[1], router(x_ND)[1])


def autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)


@BOTH
@torch.no_grad()
def test_it_can_begin_untrained(pair):
    torch.manual_seed(0)
    fresh = type(pair[1])(pair[1].config)
    for name, parameter in fresh.named_parameters():
        ordinary = parameter.ndim > 1 and not name.endswith(("_bias", "shift_LD"))
        assert not ordinary or 0.015 < parameter.std() < 0.025, name
    assert fresh(some_ids()).logits.isfinite().all()


def test_a_new_key_of_the_model_has_to_be_thought_of_here():
    from khanhllm.export.remote.configuration_khanhllm import KhanhLLMConfig

    parameters = inspect.signature(KhanhLLMConfig.__init__).parameters
    known = {key: parameters[key].default for key in parameters if key in ModelConfig.model_fields}
    assert known == ModelConfig().model_dump(exclude=UNKNOWN)


def test_the_code_stands_alone():
    for path in FILES:
        assert not any(
            line.lstrip().startswith(("import khanhllm", "from khanhllm", "from ..")) for line in path.open()
        )


@pytest.mark.parametrize("values", [True, "normed"])
def test_a_scaled_stream_leaves_as_one_that_is_not_scaled(values):
    model = ours(
        {"pattern": "MDMD", "pair_embedding": 97, "value_embedding": values, "stream_scale": True, "norm_eps": 1e-8}
    )
    shape, weights = as_unscaled(model.config, model.state_dict())
    plain = build(tiny().model_copy(update={"model": shape}))
    plain.load_state_dict(weights)
    with torch.no_grad():
        assert close(plain.logits(some_ids()), model.logits(some_ids()))


@pytest.mark.slow
def test_the_verb_writes_what_transformers_has_no_class_for(tmp_path, capsys):
    model = ours(EVERYTHING | {"token_norm": True})
    config = tiny().model_copy(update={"model": model.config})
    write_start(tmp_path / "run", config, model, TOKENIZER)
    command = ["export", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert main([*command, "--remote-code", "--dtype", "f16"]) == 0
    assert load(tmp_path / "out", dtype="auto").dtype == torch.float16
    assert "trust_remote_code=True" in (tmp_path / "out/README.md").read_text()
    assert main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 2
    assert "no way back" in capsys.readouterr().err
