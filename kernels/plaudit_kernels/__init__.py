"""Operations on packed batches: the ground floor. Imports torch, and Triton or Numba where they are
installed; nothing of ours."""

from .attention import packed_attention, reference_attention
from .blocks import TILE, BlockPlan, plan_blocks
from .compilations import watch_compilations
from .dispatch import Choice, select
from .gated import Activation, bias_gelu, gated
from .head import pooled_head
from .int8 import Int8Linear
from .linear import Fp8Linear, FrozenLinear
from .listwise import plackett_luce
from .matmul import matmul, matmul_fp8, quantize_rows
from .norm import layer_norm, rms_norm
from .pairwise import bradley_terry
from .plan import AttentionPlan, plan_attention
from .rotary import rotary
from .tiles import BLOCK, TilePlan, plan_tiles
from .varlen import fast_choice, unshared_attention

__all__ = [
    "BLOCK",
    "TILE",
    "Activation",
    "AttentionPlan",
    "BlockPlan",
    "Choice",
    "Fp8Linear",
    "FrozenLinear",
    "Int8Linear",
    "TilePlan",
    "bias_gelu",
    "bradley_terry",
    "fast_choice",
    "gated",
    "layer_norm",
    "matmul",
    "matmul_fp8",
    "packed_attention",
    "plackett_luce",
    "plan_attention",
    "plan_blocks",
    "plan_tiles",
    "pooled_head",
    "quantize_rows",
    "reference_attention",
    "rms_norm",
    "rotary",
    "select",
    "unshared_attention",
    "watch_compilations",
]
