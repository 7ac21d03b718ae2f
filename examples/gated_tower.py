"""A vision tower that sees only the patches that moved: python examples/gated_tower.py

A small SigLIP with random weights, so that nothing is downloaded: needs ``transformers``, no GPU. With a real one, take
``SiglipVisionModel.from_pretrained(...)`` and the mean and std of its processor.
"""

from __future__ import annotations

import time

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from vtok import gate_patches
from vtok.integrations.tower import encode_patches, tower_flops

torch.manual_seed(0)
tower = SiglipVisionModel(
    SiglipVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=3, image_size=112, patch_size=8
    )
).eval()

# 16 frames of a still background; a bright square crosses it
frames = torch.randint(0, 256, (1, 1, 3, 112, 112), dtype=torch.uint8).repeat(1, 16, 1, 1, 1)
for t in range(16):
    frames[0, t, :, 40:64, 5 * t : 5 * t + 24] = 255


@torch.inference_mode()
def run(share: str) -> torch.Tensor:
    packed = gate_patches(frames, patch=8, budget=share, mean=[0.5] * 3, std=[0.5] * 3)
    start = time.perf_counter()
    rows = encode_patches(tower, packed)
    ms = (time.perf_counter() - start) * 1e3
    flops, whole = tower_flops(tower, packed), tower_flops(tower, packed.layout)
    kept, sites = packed.index.shape[0], packed.layout.total
    print(f"{kept:5} of {sites} patches: {flops / 1e9:6.2f} GFLOP, {flops / whole:6.1%} of the whole, {ms:6.1f} ms")
    return rows


def main() -> None:
    run("100%")  # the first run warms up
    whole = run("100%")
    with torch.inference_mode():
        plain = tower((frames[0] / 255 - 0.5) / 0.5).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-4)
    print("every patch kept equals the plain tower")
    for share in ("50%", "25%", "10%"):
        run(share)


if __name__ == "__main__":
    main()
