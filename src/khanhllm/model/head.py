"""The head owns the output matrix and computes the loss. Nothing else needs logits in training, so the full (tokens x
vocabulary) matrix of them, as large as all activations together, never exists."""

import torch
from torch import Tensor, nn

from khanhllm.model.losses import token_nll


class Head(nn.Module):
    """The last norm and the output matrix."""

    def __init__(self, norm: nn.Module, dim: int, vocab_size: int, chunk: int) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.chunk = chunk

    def forward(self, x_BTD: Tensor, targets_BT: Tensor, counted_N: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each target (nats), (B, T), fp32; or only of those that count, (N,), by their
        place in the flattened targets: the others cost nothing here."""
        if counted_N is not None:
            x_ND = self.norm(x_BTD.flatten(0, 1)[counted_N])
            return token_nll(x_ND, self.weight, targets_BT.flatten()[counted_N], self.chunk)
        nll_T = token_nll(self.norm(x_BTD).flatten(0, 1), self.weight, targets_BT.flatten(), self.chunk)
        return nll_T.view(targets_BT.shape)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """(B, T, V) in fp32, all at one time: for generation, and for texts that are scored without a gradient."""
        return nn.functional.linear(self.norm(x_BTD), self.weight).float()
