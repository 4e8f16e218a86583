"""Gemma 3, the text decoder."""

from lockstep.models.family import Family
from lockstep.models.gemma3.model import Gemma3
from lockstep.models.gemma3.sharding import shards
from lockstep.models.gemma3.sizes import PUBLISHED, sizes
from lockstep.models.gemma3.weights import read_config, table

FAMILY = Family(read_config, Gemma3, table, sizes, shards, PUBLISHED)
