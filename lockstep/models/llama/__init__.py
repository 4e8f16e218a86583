"""Llama 2 and 3, and what is Llama in all but name: Mistral, Yi, Aquila, InternLM."""

from lockstep.models.family import Family
from lockstep.models.llama.model import Llama
from lockstep.models.llama.sharding import shards
from lockstep.models.llama.sizes import PUBLISHED, sizes
from lockstep.models.llama.weights import read_config, table

FAMILY = Family(read_config, Llama, table, sizes, shards, PUBLISHED)
