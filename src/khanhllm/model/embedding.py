"""Token ids to vectors. classic adds a learned vector for each position; modern leaves positions to Rope."""

import torch
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, dim)

    def forward(self, ids_BT: Tensor, start: int = 0) -> Tensor:
        """ids_BT -> (B, T, D); `start` is the position of the first id."""
        return self.token(ids_BT)


class TokenPositionEmbedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(context, dim)

    def forward(self, ids_BT: Tensor, start: int = 0) -> Tensor:
        position_T = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
        return self.token(ids_BT) + self.position(position_T)
