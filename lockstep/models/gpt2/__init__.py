"""GPT-2, whose architecture is also GPT-3's."""

from lockstep.models.family import Family
from lockstep.models.gpt2.model import GPT2
from lockstep.models.gpt2.sharding import shards
from lockstep.models.gpt2.sizes import PUBLISHED, sizes
from lockstep.models.gpt2.weights import read_config, table

FAMILY = Family(read_config, GPT2, table, sizes, shards, PUBLISHED)
