"""Operations on packed batches: the ground floor. Imports torch, nothing of ours."""

from .attention import packed_attention, reference_attention
from .dispatch import Choice, select
from .tiles import BLOCK, TilePlan, plan_tiles

__all__ = ["BLOCK", "Choice", "TilePlan", "packed_attention", "plan_tiles", "reference_attention", "select"]
