"""Qwen3 with a mixture of experts."""

from lockstep.models.family import Family
from lockstep.models.qwen3_moe.model import Qwen3Moe
from lockstep.models.qwen3_moe.sharding import shards
from lockstep.models.qwen3_moe.sizes import PUBLISHED, sizes
from lockstep.models.qwen3_moe.weights import read_config, table

FAMILY = Family(read_config, Qwen3Moe, table, sizes, shards, PUBLISHED)
