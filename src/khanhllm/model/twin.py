"""The dense twin of a mixture: what would the same effort have given without experts?"""

from typing import Literal

from khanhllm.schema import ModelConfig

Equal = Literal["active", "total"]


def dense_twin(model: ModelConfig, equal: Equal = "active") -> ModelConfig:
    """The dense model of the same depth and width. The inner width of its layers is the mean of those that work on each
    token in the mixture ("active": equal arithmetic), or of all ("total": equal parameters), without the router."""
    count = model.experts_per_token if equal == "active" else model.experts
    widths = [model.hidden if letter == "D" else count * model.expert_width for letter in model.pattern]
    mean = sum(widths) / len(widths)
    return model.model_copy(update={"pattern": "D" * len(model.pattern), "hidden": round(mean / 8) * 8})
