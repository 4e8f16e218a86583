"""Mixtral: Mistral with a mixture of experts."""

from lockstep.models.family import Family
from lockstep.models.mixtral.model import Mixtral
from lockstep.models.mixtral.sharding import shards
from lockstep.models.mixtral.sizes import PUBLISHED, sizes
from lockstep.models.mixtral.weights import read_config, table

FAMILY = Family(read_config, Mixtral, table, sizes, shards, PUBLISHED)
