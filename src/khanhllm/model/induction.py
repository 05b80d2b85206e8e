"""A start in which the model can copy.

An induction head (Olsson et al. 2022, arXiv 2209.11895) attends to what followed the same token the last time, and so
continues a text that repeats itself. It takes a head in each of two layers:

    position    j-1   j   ...   i
    token        A    B         A      -> B
    layer 1           <- A             notes at each position which token stands before it
    layer 2                     A      looks for the position that noted A, which is j, and raises B

From random weights neither head learns much before the other one works, which takes a small model hundreds of steps
(docs/experiments.md, "A start that can copy"). Here both look at the right places from the first step on, by their
initial values: the model has no new part, and training may change all. Mimetic initialisation (Trockman and Kolter
2023, arXiv 2305.09828) lets all of attention begin as trained models end.
"""

from typing import Any

import torch
from torch import Generator, Tensor

TOKEN, COMMON = 0.64, 0.3
"""root mean square of a token's own vector, and of the vector that is added to all of them"""
GAIN = 2.0
"""of the norms of query and key, which all heads of the first layer share, at the features that tell positions apart:
enough for the position before to outweigh all others"""
WRITTEN = 2.0
"""scale of what each of the two heads writes"""


def start_with_induction(
    tokens_VD: Tensor, head_VD: Tensor, first: Any, second: Any, generator: Generator | None = None
) -> None:
    """Change initial weights in place: those of the embedding, of the output matrix, and of the first head in `first`
    and `second`, the Attention of the first two layers. The width must be at least twice a head's; below four times,
    neighbours among the ranges of features share one."""
    dim, size = tokens_VD.shape[1], first.head_dim
    stream_DD = torch.eye(dim, device=tokens_VD.device, dtype=tokens_VD.dtype)
    common_D, read_dD, write_dD = stream_DD[0], stream_DD[1 : size + 1], stream_DD[-size:]
    tokens_VD.normal_(0, TOKEN, generator=generator).add_(COMMON * dim**0.5 * common_D)

    # the first head: every token has one query, and as its key that query, rotated on by one position
    fast_d = torch.arange(size, device=tokens_VD.device) % (size // 2) < size / 4  # what a few positions rotate far
    query_d = fast_d.to(tokens_VD.dtype)
    key_d = first.rope(query_d.view(1, 1, 1, size), start=1).flatten()
    for layer, here_d in ((first.query, query_d), (first.key, key_d)):
        layer.weight[:size] += torch.outer(here_d, common_D)
    for norm in (first.query_norm, first.key_norm):
        norm.weight[fast_d] = GAIN
    first.value.weight[:size] = read_dD
    first.out.weight[:, :size] = WRITTEN * write_dD.T

    # the second head asks for its own token where the first one notes tokens, and writes what it finds `size` features
    # further on, where the output matrix looks for it, so that no token raises itself
    second.query.weight[:size] = read_dD
    second.key.weight[:size] = write_dD
    second.value.weight[:size] = read_dD
    second.out.weight[:, :size] = WRITTEN * read_dD.roll(size, dims=1).T
    head_VD.copy_(tokens_VD.roll(size, dims=1) * head_VD.std() / TOKEN)
