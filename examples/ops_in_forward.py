"""vtok's ops inside a model's forward pass, compiled with fullgraph: python examples/ops_in_forward.py"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import vtok


class CompressedBlock(nn.Module):
    """A transformer block that sees only the rows that changed most since the previous frame."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(channels), nn.LayerNorm(channels)])
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, tokens: Tensor, layout: vtok.Layout, cu_k: Tensor, k: int) -> tuple[Tensor, Tensor]:
        likeness = torch.ops.vtok.temporal_similarity(tokens, layout.cu_seqlens, layout.tokens_per_frame)
        index = torch.ops.vtok.topk(-likeness, layout.cu_seqlens, cu_k, k)  # int64 [k], in order within each video
        rows = torch.ops.vtok.pack(tokens, index)  # [k, channels]: all that the rest of the model reads
        rows = rows + self.attention(self.norms[0](rows), cu_k)
        return rows + self.mlp(self.norms[1](rows)), index

    def attention(self, rows: Tensor, cu_k: Tensor) -> Tensor:
        """Each row attends to those of its own video."""
        row = torch.arange(rows.shape[0], device=rows.device)
        video = torch.searchsorted(cu_k, row, right=True)
        q, key, v = self.qkv(rows).view(1, rows.shape[0], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, key, v, attn_mask=video[:, None] == video)
        return self.out(mixed[0].transpose(0, 1).flatten(1))


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    block = CompressedBlock(channels=64, heads=4)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for grid in ([[8, 6, 6], [4, 6, 8]], [[16, 4, 4], [2, 8, 8], [6, 4, 6]]):  # two batches of ragged videos
        layout = vtok.Layout.from_grid(grid)  # host integers, before any tensor exists
        counts = vtok.plan(grid, budget="25%", method="evs")
        cu_k = torch.tensor([0, *counts]).cumsum(0)
        tokens = torch.randn(layout.total, 64)
        rows, index = block(tokens, layout, cu_k, sum(counts))
        again, same = compiled(tokens, layout, cu_k, sum(counts))
        assert torch.equal(index, same), "compiled code keeps the same rows"
        torch.testing.assert_close(again, rows)
        print(f"{len(grid)} videos: tokens {tuple(tokens.shape)}, kept {counts}, rows {tuple(rows.shape)}")
    print("eager equals compiled")


if __name__ == "__main__":
    main()
