"""A start in which the model can copy.

An induction head (Olsson et al. 2022, arXiv 2209.11895) attends to what followed the same token the last time, and so
continues a text that repeats itself. It takes a head in each of two layers:

    position    j-1   j   ...   i
    token        A    B         A      -> B
    layer 1           <- A             notes at each position which token stands before it
    layer 2                     A      asks where A is noted, finds j, and raises B

From random weights neither head learns much before the other one works. So a small model spends hundreds of steps in
which its loss hardly falls; on source code a third of a short run (docs/experiments.md, "A start that can copy"). Here
both heads work from the first step on, by their initial values: the model has no new part, and training may change all.
"""

from typing import Any

import torch
from torch import Generator, Tensor, nn

TOKEN, COMMON = 0.64, 0.3
"""root mean square of a token's own vector, and of the vector that is added to all of them"""
GAIN = 2.0
"""of the norms of query and key, at the features that tell positions apart: the position before outweighs all others"""
WRITTEN = 2.0
"""scale of what each of the two heads writes, which is then about twice the token's own vector"""


def start_with_induction(
    tokens_VD: Tensor, head_VD: Tensor, first: Any, second: Any, generator: Generator | None = None
) -> None:
    """Change initial weights in place: those of the embedding, of the output matrix, and of the first head in `first`
    and `second`, the Attention of the first two layers. The width must be at least twice a head's."""
    dim, size = tokens_VD.shape[1], first.head_dim
    basis_DD = nn.init.orthogonal_(tokens_VD.new_empty(dim, dim), generator=generator)
    common_D, read_dD, write_dD = basis_DD[0], basis_DD[1 : 1 + size], basis_DD[-size:]
    tokens_VD.normal_(0, TOKEN, generator=generator).add_(COMMON * dim**0.5 * common_D)

    # the first head: every token has one query, and as its key that query, rotated on by one position
    fast_d = torch.arange(size, device=tokens_VD.device) % (size // 2) < size // 4  # what a few positions rotate far
    query_d = fast_d.to(tokens_VD.dtype)
    key_d = first.rope(query_d.view(1, 1, 1, size), start=1).flatten()
    for layer, here_d in ((first.query, query_d), (first.key, key_d)):
        layer.weight[:size] += torch.outer(here_d, common_D)
    for norm in (first.query_norm, first.key_norm):
        norm.weight[fast_d] = GAIN
    first.value.weight[:size] = read_dD
    first.out.weight[:, :size] = WRITTEN * write_dD.T

    # the second head asks for its own token, in the form in which the first one notes tokens
    second.query.weight[:size] = read_dD
    second.key.weight[:size] = write_dD
    second.value.weight[:size] = read_dD
    second.out.weight[:, :size] = WRITTEN * read_dD.T
    head_VD.copy_(tokens_VD * head_VD.std() / TOKEN)
