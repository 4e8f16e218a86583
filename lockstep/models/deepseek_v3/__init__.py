"""DeepSeek-V3 and R1."""

from lockstep.models.deepseek_v3.model import DeepseekV3
from lockstep.models.deepseek_v3.sharding import shards
from lockstep.models.deepseek_v3.sizes import PUBLISHED, sizes
from lockstep.models.deepseek_v3.weights import read_config, table
from lockstep.models.family import Family

FAMILY = Family(read_config, DeepseekV3, table, sizes, shards, PUBLISHED)
