"""An exported folder is Qwen3-MoE: transformers, which had no part in writing it, computes the same logits."""

import json
import os
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from conftest import build, save, tiny
from khanhllm.cli import main
from khanhllm.data.shards import Shards
from khanhllm.data.tokenizer import Tokenizer, train_tokenizer
from khanhllm.errors import UserError
from khanhllm.export import check, encode, hf
from khanhllm.export.card import card
from khanhllm.export.exporting import export
from khanhllm.export.importing import import_model
from khanhllm.inference.generate import continuation
from khanhllm.model.rope import Rope
from khanhllm.runs.run import open_run
from khanhllm.schema import Sampling
from khanhllm.settings import preset, resolve, write_config

transformers = pytest.importorskip("transformers")
TEXT = "Once upon a time there was a house with eight rooms, of which two were open. 12 345 äöü 你好 \n\n  def f(x):\n"
ODD = [
    "",
    " ",
    "a  b\t\n\n c",
    "0123456789 3.14",
    "ÄÖÜß naïve 東京 🙂👩‍👩‍👧",
    "हिन्दी ไทย",
    "can't WE'LL",
    "\x00\x7f",
    "x" * 300,
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 3], 290)


def a_run(folder, tokenizer, scale=4.0, **model):
    """A run whose logits are far from flat, so that a difference shows."""
    config = tiny(**model)
    ours = build(config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "tables" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
            elif name.endswith(("stream_L", "shift_LD")):
                parameter.uniform_(-0.8, 0.8, generator=torch.Generator().manual_seed(1))
            elif parameter.ndim > 1:
                parameter.mul_(scale)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
        for name, buffer in ours.named_buffers():
            if name.endswith("bias_E"):
                buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    write_config(config, folder)
    optimizer = torch.optim.SGD(ours.parameters())
    save(folder, 3, ours, optimizer, {"cursor": 9, "folder": "", "data": ""})
    return open_run(folder)


def exported(run, out, **options):
    return export(run.checkpoint, "hf", out, **options)


def theirs(folder, **options):
    """transformers' model, whole: no tensor missing, unknown or of another shape."""
    found, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found.eval()


def some_ids(rows=3, length=32):
    return torch.randint(290, (rows, length), generator=torch.Generator().manual_seed(1))


def largest_difference(run, folder):
    with torch.no_grad():
        ours = run.model.logits(some_ids())
        assert ours.std() > 0.5  # not equal because both are nothing
        return float((ours - theirs(folder)(some_ids()).logits).abs().max())


SHAPES = {
    "alternating": {"pattern": "DMDM"},
    "any_order": {"pattern": "MDDMM"},
    "all_mixtures": {"pattern": "MMM", "experts": 5, "experts_per_token": 3},
    "all_dense": {"pattern": "DDD"},
    "shared_heads": {"pattern": "DM", "kv_heads": 2},
    "one_expert_per_token": {"pattern": "DM", "experts_per_token": 1},
    "own_expert_width": {"pattern": "DM", "expert_hidden": 24},
    "relu2": {"pattern": "DM", "feedforward": "relu2"},
    "own_values": {"pattern": "MDDM", "value_embedding": "normed"},
    "normed_tokens": {"pattern": "DM", "token_norm": True},
    "shifted_tokens": {"token_shift": True},
    "shifted_tokens_of_shared_heads": {"pattern": "DMD", "token_shift": True, "kv_heads": 1, "norm_eps": 0.01},
    "shifted_tokens_and_all": {
        "pattern": "MMM",
        "kv_heads": 2,
        "feedforward": "relu2",
        "value_embedding": "normed",
        "token_norm": True,
        "token_shift": True,
        "stream_scale": True,
        "norm_eps": 1e-8,
    },
    "scaled_stream": {"pattern": "MDDM", "stream_scale": True, "norm_eps": 1e-8},  # export keeps all but it
    "own_values_in_a_scaled_stream": {"value_embedding": "normed", "stream_scale": True, "norm_eps": 1e-8},
    "own_values_in_every_layer": {"pattern": "DMM", "value_embedding": "normed", "value_every": 1, "norm_eps": 1e-8},
    "own_values_of_shared_heads": {"pattern": "DMM", "value_embedding": "normed", "kv_heads": 2, "norm_eps": 0.01},
    "rope_and_eps": {"pattern": "DM", "rope_theta": 500.0, "norm_eps": 0.01},
}
ENCODED = {name for name in SHAPES if name.startswith(("relu2", "normed", "scaled", "shifted", "own_values"))}
"""what comes back in another form"""


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_transformers_computes_our_logits(tmp_path, tokenizer, shape):
    run = a_run(tmp_path / "run", tokenizer, **shape)
    assert largest_difference(run, exported(run, tmp_path / "out")) < 1e-4


COMPATIBLE = SHAPES | {
    "few_experts": {"pattern": "DM", "experts": 3},
    "shifted_and_one_expert_per_token": {"pattern": "MM", "experts_per_token": 1, "token_shift": True},
}


@pytest.mark.parametrize(
    "shape",
    [
        "alternating",
        "any_order",
        "shared_heads",
        "relu2",
        "few_experts",
        "own_values",
        "shifted_tokens",
        "shifted_and_one_expert_per_token",
    ],
)
def test_the_compatible_form_has_mixtures_only_and_computes_the_same(tmp_path, tokenizer, shape):
    run = a_run(tmp_path / "run", tokenizer, **COMPATIBLE[shape])
    folder = exported(run, tmp_path / "out", compatible=True)
    assert json.loads((folder / "config.json").read_text())["mlp_only_layers"] == []
    assert largest_difference(run, folder) < 1e-4


@pytest.mark.parametrize(
    "name",
    ["nano", "hour", "evening", "mini", "small", "modern-692m", "card-8gb", "card-12gb", "card-24gb"],
)
def test_every_preset_that_people_train_leaves_without_code_of_ours(tmp_path, tokenizer, name):
    shape = resolve(preset(name)).model
    small = {
        "dim": 32,
        "heads": 4,
        "kv_heads": 2 if shape.kv_heads else 0,
        "hidden": 48,
        "expert_hidden": 24,
        "context": 32,
        "vocab_size": 300,
    }
    run = a_run(tmp_path / "run", tokenizer, scale=2.0, **(shape.model_dump() | small))
    assert largest_difference(run, exported(run, tmp_path / "out")) < 1e-4


def test_greedy_text_is_the_same(tmp_path, tokenizer):
    run = a_run(tmp_path / "run", tokenizer, pattern="DMD", context=128)
    folder = exported(run, tmp_path / "out")
    start = [tokenizer.end_of_text, *tokenizer.encode("Once")]
    ours = list(continuation(run.model, start, Sampling(tokens=100, temperature=0), run.machine, 300))
    model, ids = theirs(folder), torch.tensor([start])
    said = model.generate(
        ids, max_new_tokens=100, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids)
    )
    assert said[0, len(start) :].tolist() == ours


def test_the_tokenizer_reads_as_ours_after_an_end_of_text(tmp_path, tokenizer):
    folder = exported(a_run(tmp_path / "run", tokenizer), tmp_path / "out")
    other = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [TEXT, *ODD]:
        assert other(text)["input_ids"] == [tokenizer.end_of_text, *tokenizer.encode(text)], text
        assert other.decode(other(text)["input_ids"], skip_special_tokens=True) == text
    assert (other.bos_token_id, other.eos_token_id, other.model_max_length) == (0, 0, 32)
    notes = json.loads((folder / "tokenizer_config.json").read_text())
    assert notes["model_input_names"] == ["input_ids", "attention_mask"]  # what our architectures take


def test_pipeline_and_save_pretrained(tmp_path, tokenizer):
    run = a_run(tmp_path / "run", tokenizer, context=64)
    folder = exported(run, tmp_path / "out")
    writes = transformers.pipeline("text-generation", model=str(folder))
    assert writes("Once", max_new_tokens=5, do_sample=False)[0]["generated_text"].startswith("Once")
    writes.model.save_pretrained(tmp_path / "again")
    assert largest_difference(run, tmp_path / "again") < 1e-4


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_halves_load_as_halves(tmp_path, tokenizer, dtype):
    folder = exported(a_run(tmp_path / "run", tokenizer, scale=1.0), tmp_path / "out", dtype=dtype)
    assert theirs(folder, dtype="auto").dtype == {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]


@pytest.mark.parametrize("compared", [True, False])
def test_numbers_beyond_f16_are_refused(tmp_path, tokenizer, compared):
    run = a_run(tmp_path / "run", tokenizer, scale=1e6)
    with pytest.raises(UserError, match=r"^model\.\S+ holds numbers beyond the range of f16; export with --dtype bf16"):
        exported(run, tmp_path / "out", dtype="f16", compared=compared)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_check_reads_held_out_text_and_says_so_where_there_is_none(talks, tmp_path):
    """Also where the last window is short."""
    learned = Tokenizer.load(talks / "tokenizer.json")
    shards = Shards.open(talks, "validation", 30)
    ids_NT, source = check.windows(talks, learned, 30)
    assert ids_NT.tolist() == [shards.row(nth)[:30].tolist() for nth in range(6)] and source == "held-out text"
    assert check.windows(tmp_path, learned, 30)[1] == "ids drawn at random"


def test_the_card_tells_of_the_shape_that_was_written(tmp_path, tokenizer):
    folder = exported(a_run(tmp_path / "run", tokenizer, pattern="MM", token_shift=True), tmp_path / "out")
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    told = (folder / "README.md").read_text("utf-8")
    assert "(2 dense and 2 mixture layers," in told and f" width {width}, " in told


def test_the_card_names_no_folder_of_this_machine(tmp_path):
    source = f"{tmp_path / 'tales.txt'}:0.8, hf://datasets/a/b:0.2"
    config = resolve({"data": {"source": source}})
    text = card(tmp_path, config, config.model, 3, 9, "f32", "", "out", False)
    assert "`tales.txt:0.8, hf://datasets/a/b:0.2`" in text and str(tmp_path) not in text
    config = resolve({"data": {"source": f"{tmp_path}/a, b/tales.txt"}})
    assert "`tales.txt`" in card(tmp_path, config, config.model, 3, 9, "f32", "", "out", False)


def test_several_files_of_weights(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(hf, "SHARD", 20_000)
    run = a_run(tmp_path / "run", tokenizer)
    folder = exported(run, tmp_path / "out")
    assert len(list(folder.glob("model-0*-of-0*.safetensors"))) > 2
    assert largest_difference(run, folder) < 1e-4


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - ENCODED))
def test_the_way_back_is_the_identity(tmp_path, tokenizer, name):
    run = a_run(tmp_path / "run", tokenizer, **SHAPES[name])
    import_model(exported(run, tmp_path / "out"), tmp_path / "back")
    back = open_run(tmp_path / "back")
    ours, found = run.model.state_dict(), back.model.state_dict()
    assert ours.keys() == found.keys()
    assert all(torch.equal(ours[name], found[name]) for name in ours)
    assert back.tokenizer.sha256 == tokenizer.sha256
    assert back.step == 0


def test_what_transformers_writes_can_be_imported(tmp_path, tokenizer):
    """With heads tied to the embedding, and names and settings as their library saves them."""
    folder = exported(a_run(tmp_path / "run", tokenizer, pattern="DM"), tmp_path / "out")
    small = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    layers = {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mlp_only_layers": [1],
    }
    config = transformers.Qwen3MoeConfig(
        **small, **layers, norm_topk_prob=True, tie_word_embeddings=True, max_position_embeddings=64
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "stranger")
    (tmp_path / "stranger/tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    import_model(tmp_path / "stranger", tmp_path / "ours", context=32)
    found = open_run(tmp_path / "ours")
    assert (found.config.model.pattern, found.config.model.context) == ("MDM", 32)
    with torch.no_grad():
        assert (found.model.logits(some_ids()) - model(some_ids()).logits).abs().max() < 1e-4
    weights = load_file(tmp_path / "stranger/model.safetensors")
    stored = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(stored, tmp_path / "stranger/model.safetensors", {"format": "pt"})
    import_model(tmp_path / "stranger", tmp_path / "again", context=32)
    with torch.no_grad():
        assert open_run(tmp_path / "again").model.logits(some_ids()).equal(found.model.logits(some_ids()))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model_type", "llama", r"model_type: must be qwen3 or qwen3_moe \(got 'llama'\)"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("attention_bias", True, "attention_bias is True"),
        ("head_dim", 16, "head_dim is 16"),
        ("norm_topk_prob", False, "norm_topk_prob is False"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_type is 'yarn'"),
        ("num_hidden_layers", 3, "lacks the tensor model.layers.2."),
        ("num_hidden_layers", 1, r"unknown to this architecture, the tensor model.layers.1."),
        ("hidden_size", "wide", r"config\.json: hidden_size: must be a whole number"),
        ("vocab_size", 301, r"is F32 \[300, 32\]; config.json asks for \[301, 32\]"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
    ],
)  # fmt: skip
def test_a_model_that_ours_cannot_be_is_refused_by_its_key(tmp_path, tokenizer, key, value, told):
    folder = exported(a_run(tmp_path / "run", tokenizer), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=told):
        import_model(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_import_in_a_form_that_training_destroys_is_told(tmp_path, tokenizer, capsys):
    for nth, (shape, told) in enumerate([({}, False), ({"token_shift": True}, True), (SHAPES["own_values"], True)]):
        run = a_run(tmp_path / f"run{nth}", tokenizer, **shape)
        import_model(exported(run, tmp_path / f"out{nth}"), tmp_path / f"back{nth}")
        said = capsys.readouterr().out.splitlines()[-1]
        assert ("that training destroys" in said, "train --resume" in said) == (told, not told)


@pytest.mark.parametrize(("size", "context"), [(8, 512), (16, 4096), (64, 4096), (64, 2)])
def test_a_head_that_looks_back_sees_nothing_but_the_position_before(size, context):
    model = tiny(dim=2 * size, heads=2, context=context).model
    layer = encode._looking_back(model)
    rope = Rope(size, context, model.rope_theta)
    query, key = (
        rope(
            F.rms_norm(
                layer[f"attention.{side}.weight"][:size, -1], (size,), layer[f"attention.{side}_norm.weight"]
            ).expand(1, 1, context, size)
        )[0, 0]
        for side in ("query", "key")
    )
    score_T = query[-1] @ key.T / size**0.5
    assert score_T.softmax(-1)[-2] > 1 - 1e-6
    assert (score_T[-2] - score_T)[torch.arange(context) != context - 2].min() > 0.9 * encode.MARGIN


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            {"dim": 16, "heads": 4, "context": 2048},
            r"token_shift: heads of 4 features cannot tell 2048 positions apart",
        ),
        ({"pattern": "D" * 129}, r"token_shift doubles the layers in this form, which may have 256"),
    ],
)
def test_a_shift_that_no_other_tool_can_hold_is_refused(model, told):
    config = tiny(token_shift=True, **model).model
    weights = build(tiny(token_shift=True, **model)).state_dict()
    with pytest.raises(UserError, match=f"{told}.*--remote-code"):
        encode.as_deeper(*encode.as_wider(config, weights))


def test_a_stream_that_a_layer_turns_round_is_refused(tmp_path, tokenizer):
    run = a_run(tmp_path / "run", tokenizer, stream_scale=True)
    with torch.no_grad():
        run.model.embedding_skip.stream_L[1] = -1.5
    save(
        tmp_path / "run", 4, run.model, torch.optim.SGD(run.model.parameters()), {"cursor": 0, "folder": "", "data": ""}
    )
    with pytest.raises(UserError, match=r"stream_scale: layer 1 multiplies the stream by -0.5"):
        exported(open_run(tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "shape",
    [{"style": "classic"}, {"value_embedding": True}, {"pair_embedding": 64}, {"embedding_skip": True},
     {"router_bias": True}],
    ids=lambda shape: next(iter(shape)),
)  # fmt: skip
def test_a_shape_that_they_do_not_have_is_refused_by_name(tmp_path, tokenizer, shape):
    run = a_run(tmp_path / "run", tokenizer, **shape)
    with pytest.raises(UserError, match=rf"model\.{next(iter(shape))} is .*--remote-code"):
        exported(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def of_another_type(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(32, dtype=torch.int32)}, folder / "model.safetensors")


def not_finite(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.full((32,), torch.nan)}, folder / "model.safetensors")


def a_pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def an_index_without_a_map(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def gone(folder):
    (folder / "model.safetensors").unlink()


def cut(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("damage", [of_another_type, not_finite, a_pipe, an_index_without_a_map, gone, cut])
def test_damaged_weights_are_one_line_and_leave_nothing(tmp_path, tokenizer, damage):
    folder = exported(a_run(tmp_path / "run", tokenizer), tmp_path / "out")
    damage(folder)
    with pytest.raises(UserError, match=r"I32|not finite|no file|weight_map|cannot read"):
        import_model(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def damage_weight(name, change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / "model.safetensors")

    return damage


def swap_gate_and_up(folder):
    tensors, mlp = load_file(folder / "model.safetensors"), "model.layers.0.mlp."
    swapped = {f"{mlp}gate_proj.weight": f"{mlp}up_proj.weight", f"{mlp}up_proj.weight": f"{mlp}gate_proj.weight"}
    save_file({swapped.get(name, name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def lose_a_norm(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def set_config(**keys):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | keys))

    return damage


DAMAGES = {
    "one_weight": damage_weight("lm_head.weight", lambda t: torch.cat((t[:1] * 2, t[1:]))),
    "swapped": swap_gate_and_up,
    "lost_norm": lose_a_norm,
    "rope_base": set_config(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_theta=500.0),
    "end_of_text": set_config(eos_token_id=7),
    "eps": set_config(rms_norm_eps=0.1),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_check_sees_what_is_wrong_and_nothing_is_published(tmp_path, tokenizer, monkeypatch, damage):
    run, write = a_run(tmp_path / "run", tokenizer), hf.write

    def damaged(folder, *arguments):
        write(folder, *arguments)
        damage(folder)

    monkeypatch.setattr(hf, "write", damaged)
    with pytest.raises(UserError, match=r"nothing was published|lacks the tensor"):
        exported(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    exported(run, tmp_path / "out", compared=False)
    assert "not compared" in (tmp_path / "out/README.md").read_text()


def test_a_damaged_checkpoint_or_a_taken_place_is_refused(tmp_path, tokenizer):
    run = a_run(tmp_path / "run", tokenizer)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        exported(run, tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        exported(run, tmp_path / "link")
    with pytest.raises(UserError, match="'q8_0' cannot be written for hf"):
        exported(run, tmp_path / "out", dtype="q8_0")
    command = ["export", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")]
    assert main([*command, "--step", "2"]) == 2
    (run.checkpoint / "model.safetensors").write_bytes(b"nothing")
    assert main(command) == main([*command, "--step", "3"]) == 2
    assert not (tmp_path / "out").exists()


def test_files_have_the_usual_modes_and_the_card_the_figures(tmp_path, tokenizer):
    before = os.umask(0o027)
    try:
        folder = exported(a_run(tmp_path / "run", tokenizer), tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    readme = (folder / "README.md").read_text()
    assert "logits differ by at most" in readme and "from scratch" not in readme
    assert "3 optimizer steps, 288 tokens in all" in readme  # 9 rows of 32
    assert 'from_pretrained("out"' in readme


@pytest.mark.parametrize("out", ["text/x", "a" * 300, "", "loop"])
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_place_that_cannot_be_is_refused_in_one_line(tmp_path, tokenizer, capsys, monkeypatch, out, to):
    a_run(tmp_path / "run", tokenizer)
    (tmp_path / "text").write_text("precious")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path)
    with suppress(SystemExit):
        assert main(["export", "run", "--to", to, "--out", out]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "unforeseen" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "run", "text"]


def test_less_context_may_be_taken_but_not_more(tmp_path, tokenizer):
    folder = exported(a_run(tmp_path / "run", tokenizer), tmp_path / "out")
    assert import_model(folder, tmp_path / "less", 16).model.context == 16
    with pytest.raises(UserError, match="more than the 32 tokens"):
        import_model(folder, tmp_path / "more", 33)


def test_an_open_run_exports_itself(tmp_path, tokenizer):
    run = a_run(tmp_path / "run", tokenizer)
    assert largest_difference(run, run.export(tmp_path / "out")) < 1e-4


def test_the_command_line(tmp_path, tokenizer, capsys):
    a_run(tmp_path / "run", tokenizer)
    assert main(["export", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    assert "checked:" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    assert main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 2
    assert main(["import", str(tmp_path / "run"), "--out", str(tmp_path / "more")]) == 2
