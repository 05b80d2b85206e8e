"""What kind of parameter a name stands for. Initial values, optimizer groups, weight decay and bf16 all use `role`, so
a new module needs one entry here, and a model with a module that has none cannot be initialised."""

from enum import Enum


class Role(Enum):
    """The kinds of parameters."""

    TOKEN = "a vector for each token"
    POSITION = "a vector for each position"
    ADDED = "a vector added to what a token brings: of a pair of neighbours, or to attention's values"
    HEAD = "the output matrix"
    ROUTER = "the router's matrix"
    INPUT = "a matrix that reads the residual stream, or stands inside a layer"
    OUTPUT = "a matrix that writes into the residual stream"
    NORM = "the gain of a norm"
    BIAS = "a bias; those of experts are stacked, one row for each"
    SKIP = "a number for each layer, or for each of its features, that scales what enters the layer"


TABLES = {Role.TOKEN, Role.POSITION, Role.ADDED}
"""looked up, not multiplied"""
HIDDEN = {Role.INPUT, Role.OUTPUT}
"""of attention, feed-forward and experts"""

OWNERS = {
    "token": Role.TOKEN,
    "position": Role.POSITION,
    "pair": Role.ADDED,
    "head": Role.HEAD,
    "router": Role.ROUTER,
    **dict.fromkeys(("query", "key", "value", "gate", "up"), Role.INPUT),
    **dict.fromkeys(("out", "down"), Role.OUTPUT),
    **dict.fromkeys(("stream_L", "embedding_L", "shift_LD"), Role.SKIP),
}
"""the module that owns a `weight`, or the parameter itself where experts are stacked"""


def role(name: str) -> Role:
    """The role of a parameter, from its name in `named_parameters`, or of a router's bias, which is a buffer. Raises
    ValueError for one that is not known."""
    path, _, leaf = name.rpartition(".")
    owner = path.rpartition(".")[2] if leaf == "weight" else leaf
    if leaf in ("bias", "bias_E") or leaf.endswith("_bias"):
        return Role.BIAS
    if owner == "norm" or owner.endswith("_norm"):
        return Role.NORM
    if path.startswith("value_embedding.tables"):
        return Role.ADDED
    if owner not in OWNERS:
        raise ValueError(f"the parameter {name} has no role; give it one in model/roles.py")
    return OWNERS[owner]
