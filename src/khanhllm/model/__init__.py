"""The model, in the order a learner reads it: rope, cache, attention, feedforward, router, activations, dispatch,
experts, expert_loop, moe, block, head, embedding, transformer. `exchange` is for experts that lie on several processes.

Shapes stand in the names of tensors, one letter per axis:

    B  rows in the micro-batch      T  positions in a row; in router, experts and moe: all tokens of the micro-batch
    D  model width (dim)            H  attention heads            d  features of one head
    F  inner width of a feed-forward
    E  experts                      K  experts per token          N  token-expert pairs, N = T x K
    V  vocabulary                   L  mixture layers
    P  processes with experts       M  pairs that come to those of one process
    I  inputs of a matrix           O  its outputs                R  rows of one expert
    C  rows of one chunk of logits
    S  positions that a query may see, in mask_BHTS; in value_BTS and own_BTS kv_heads x d numbers

`x_BTD` is therefore (rows, positions, features). Nothing in this folder opens a device or knows an optimizer, and only
`exchange` knows that there are other processes.
"""

from khanhllm.model.cache import KVCache
from khanhllm.model.router import Routing
from khanhllm.model.transformer import Transformer

__all__ = ["KVCache", "Routing", "Transformer"]
