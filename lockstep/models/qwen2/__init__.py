"""Qwen2 and Qwen2.5: Llama with biases on q, k, v and an optional sliding window in the upper layers."""

from lockstep.models.family import Family
from lockstep.models.qwen2.model import Qwen2
from lockstep.models.qwen2.sharding import shards
from lockstep.models.qwen2.sizes import PUBLISHED, sizes
from lockstep.models.qwen2.weights import read_config, table

FAMILY = Family(read_config, Qwen2, table, sizes, shards, PUBLISHED)
