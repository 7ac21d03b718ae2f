from __future__ import annotations

import pytest
import torch

from tiny_models import IMAGE, PAD, VIDEO, llava, qwen


@pytest.fixture(scope="module", params=["qwen", "llava"])
def model(request):
    torch.manual_seed(1)
    made = {"qwen": qwen, "llava": llava}[request.param]().eval()
    made.generation_config.pad_token_id = PAD
    made.generation_config.suppress_tokens = [VIDEO, IMAGE]
    return made
