"""Our parameters, and what transformers (Qwen3, Qwen3-MoE) and llama.cpp (GGUF) call them."""

from typing import NamedTuple

ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
EXPERTS = ("gate", "up", "down")


class Weight(NamedTuple):
    """One of our parameters, and its names elsewhere."""

    ours: str
    hf: str
    """{} in it stands for the number of the expert: each has tensors of its own"""
    gguf: str
    stacked: bool = False
    """ours is (E, in, out), as experts are; elsewhere each matrix is (out, in)"""


def weights(pattern: str) -> list[Weight]:
    """Every parameter of a modern model with swiglu layers; `pattern` as in [model]."""
    found = [
        Weight("embedding.token.weight", "model.embed_tokens.weight", "token_embd.weight"),
        Weight("head.norm.weight", "model.norm.weight", "output_norm.weight"),
        Weight("head.weight", "lm_head.weight", "output.weight"),
    ]
    for layer, letter in enumerate(pattern):
        found += [
            Weight(f"blocks.{layer}.{ours}", f"model.layers.{layer}.{hf}", f"blk.{layer}.{gguf}", "experts" in ours)
            for ours, hf, gguf in [*_attention(), *(_dense() if letter == "D" else _mixture())]
        ]
    return found


def _attention() -> list[tuple[str, str, str]]:
    return [
        ("attention_norm.weight", "input_layernorm.weight", "attn_norm.weight"),
        ("feedforward_norm.weight", "post_attention_layernorm.weight", "ffn_norm.weight"),
        ("attention.query_norm.weight", "self_attn.q_norm.weight", "attn_q_norm.weight"),
        ("attention.key_norm.weight", "self_attn.k_norm.weight", "attn_k_norm.weight"),
        *(
            (
                f"attention.{part}.weight",
                f"self_attn.{letter}_proj.weight",
                f"attn_{'output' if part == 'out' else letter}.weight",
            )
            for part, letter in ATTENTION.items()
        ),
    ]


def _dense() -> list[tuple[str, str, str]]:
    return [(f"feedforward.{part}.weight", f"mlp.{part}_proj.weight", f"ffn_{part}.weight") for part in EXPERTS]


def _mixture() -> list[tuple[str, str, str]]:
    return [
        ("feedforward.router.weight", "mlp.gate.weight", "ffn_gate_inp.weight"),
        *(
            (f"feedforward.experts.{part}", f"mlp.experts.{{}}.{part}_proj.weight", f"ffn_{part}_exps.weight")
            for part in EXPERTS
        ),
    ]
