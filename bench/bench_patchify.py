"""patchify at real sizes: a quarter of the patches of a clip, in order, normalised for the tower that takes them."""

from __future__ import annotations

import torch

from vtok.bench.workload import VIDEOS, Workload

# clone() of the same bytes writes as many as it reads; a row of bf16 is twice the pixels it comes from, and memory that
# a process writes for the first time costs several times what reading it does.
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def workloads() -> list[Workload]:
    return [clip(name, *video) for name, video in VIDEOS.items()]
