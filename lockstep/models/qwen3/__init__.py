"""Qwen3: Llama with a norm on every query and key head."""

from lockstep.models.family import Family
from lockstep.models.qwen3.model import Qwen3
from lockstep.models.qwen3.sharding import shards
from lockstep.models.qwen3.sizes import PUBLISHED, sizes
from lockstep.models.qwen3.weights import read_config, table

FAMILY = Family(read_config, Qwen3, table, sizes, shards, PUBLISHED)
