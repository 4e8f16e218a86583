"""Gemma 2."""

from lockstep.models.family import Family
from lockstep.models.gemma2.model import Gemma2
from lockstep.models.gemma2.sharding import shards
from lockstep.models.gemma2.sizes import PUBLISHED, sizes
from lockstep.models.gemma2.weights import read_config, table

FAMILY = Family(read_config, Gemma2, table, sizes, shards, PUBLISHED)
