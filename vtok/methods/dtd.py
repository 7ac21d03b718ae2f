"""dtd, TimeChat-Online's token drop on features: tokens that differ enough from the frame before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vtok.layout import Layout
from vtok.methods import Merged, register
from vtok.methods.dtd_pixel import relative_rows as relative_rows
from vtok.methods.temporal_merge import temporal_merge

if TYPE_CHECKING:
    from vtok.decide import Goal


@register("dtd", kind="merge")
def dtd(tokens: Tensor, layout: Layout, goal: Goal) -> Merged:
    """Drop a token whose cosine to the one a frame earlier is above the threshold (strictly); the first frame whole.

    The one before is the reference, kept or not, so slow drift goes unseen. A kept token stays as it is; ``assignment``
    says which kept token of its site each dropped one repeats. The release's threshold is 0.5 on the embeddings that
    enter the language model. Its relative mode, which drops a share of each frame but the first, is a budget of
    ``relative_rows`` for each: ``budget=[[sites] + [relative_rows(sites, share)] * (frames - 1)]``.

    Departs from the release in ties of the relative mode, which it leaves to the sort; here they go to the lower row.

    Source: the feature mode of TimeChat-Online's differential token drop.
    """
    return temporal_merge(tokens, layout, goal, reduce="first")
