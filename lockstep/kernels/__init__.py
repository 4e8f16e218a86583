"""Exact operations of policies and language models: each has a naive twin (the definition) and a compiled one.

A row's result depends on that row only: not on the batch it is in, its place there, or the number of threads.
"""

from lockstep.kernels.activation import activate, gated
from lockstep.kernels.actor_critic import ActorCriticGradients, RolloutRows
from lockstep.kernels.adam import FusedAdam, polyak
from lockstep.kernels.attention import KVCache, LayerCache, attention
from lockstep.kernels.categorical import categorical_evaluate, categorical_mode, categorical_sample
from lockstep.kernels.gates import gru_gates, gru_sequence, lstm_gates, lstm_sequence
from lockstep.kernels.gather import gather_rows
from lockstep.kernels.gaussian import (
    gaussian_evaluate,
    gaussian_sample,
    squashed_gaussian_head,
    squashed_gaussian_sample,
)
from lockstep.kernels.logprobs import head_logprobs, soft_cap, token_logprobs, top_logprobs
from lockstep.kernels.mlp import ACTIVATIONS, linear, mlp
from lockstep.kernels.native import describe, force, num_processors, num_threads, set_num_threads
from lockstep.kernels.noise import noise_bits, normal, uniform, uniform_index
from lockstep.kernels.norm import add_rms_norm, layer_norm, rms_norm
from lockstep.kernels.normalise import normalise
from lockstep.kernels.packed_linear import (
    PackedWeight,
    grouped_linear,
    packed_linear,
    trained_grouped_linear,
    trained_linear,
)
from lockstep.kernels.plan import ActPlan, Head, Net, Normaliser
from lockstep.kernels.ppo import STATS as PPO_STATS
from lockstep.kernels.ppo import ppo_surrogate
from lockstep.kernels.q_learning import QGradients, TransitionRows
from lockstep.kernels.rope import rope
from lockstep.kernels.sampling import sample_tokens, score_tokens
from lockstep.kernels.scan import discounted_return, gae, nstep_returns, vtrace
from lockstep.kernels.soft_actor_critic import SoftGradients
from lockstep.kernels.sumtree import SumTree

__all__ = [
    "ACTIVATIONS",
    "PPO_STATS",
    "ActPlan",
    "ActorCriticGradients",
    "FusedAdam",
    "Head",
    "KVCache",
    "LayerCache",
    "Net",
    "Normaliser",
    "PackedWeight",
    "QGradients",
    "RolloutRows",
    "SoftGradients",
    "SumTree",
    "TransitionRows",
    "activate",
    "add_rms_norm",
    "attention",
    "categorical_evaluate",
    "categorical_mode",
    "categorical_sample",
    "describe",
    "discounted_return",
    "force",
    "gae",
    "gated",
    "gather_rows",
    "gaussian_evaluate",
    "gaussian_sample",
    "grouped_linear",
    "gru_gates",
    "gru_sequence",
    "head_logprobs",
    "layer_norm",
    "linear",
    "lstm_gates",
    "lstm_sequence",
    "mlp",
    "noise_bits",
    "normal",
    "normalise",
    "nstep_returns",
    "num_processors",
    "num_threads",
    "packed_linear",
    "polyak",
    "ppo_surrogate",
    "rms_norm",
    "rope",
    "sample_tokens",
    "score_tokens",
    "set_num_threads",
    "soft_cap",
    "squashed_gaussian_head",
    "squashed_gaussian_sample",
    "token_logprobs",
    "top_logprobs",
    "trained_grouped_linear",
    "trained_linear",
    "uniform",
    "uniform_index",
    "vtrace",
]
