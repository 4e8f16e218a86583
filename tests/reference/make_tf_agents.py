"""Policies of TF-Agents as PolicySaver writes them, with what the real networks compute: python make_tf_agents.py FOLDER

Written for TF-Agents 0.19 on TensorFlow 2.15; see README.md beside it.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from tf_agents.agents.ddpg.actor_network import ActorNetwork
from tf_agents.agents.ppo.ppo_policy import PPOPolicy
from tf_agents.agents.sac.tanh_normal_projection_network import TanhNormalProjectionNetwork
from tf_agents.networks.actor_distribution_network import ActorDistributionNetwork
from tf_agents.networks.normal_projection_network import NormalProjectionNetwork
from tf_agents.networks.q_network import QNetwork
from tf_agents.networks.value_network import ValueNetwork
from tf_agents.policies.actor_policy import ActorPolicy
from tf_agents.policies.greedy_policy import GreedyPolicy
from tf_agents.policies.policy_saver import PolicySaver
from tf_agents.policies.q_policy import QPolicy
from tf_agents.specs.tensor_spec import BoundedTensorSpec, TensorSpec
from tf_agents.trajectories import time_step as ts
from tf_agents.utils.tensor_normalizer import EMATensorNormalizer, StreamingTensorNormalizer

OUT = sys.argv[1]
ROWS = 5
OBS = TensorSpec((4,), tf.float32, "obs")
IMAGE = BoundedTensorSpec((20, 20, 3), tf.float32, 0.0, 1.0, "obs")
CHOICE = BoundedTensorSpec((), tf.int64, 0, 2, "act")
LOW, HIGH = np.array([-1.0, -2.0], np.float32), np.array([1.0, 3.0], np.float32)
VECTOR = BoundedTensorSpec((2,), tf.float32, LOW, HIGH, "act")
rng = np.random.default_rng(0)
cases = []


def store(name, policy, outputs, *, greedy=True, options=None):
    """Random weights; `outputs`: time step -> what the real networks compute."""
    for variable in policy.variables():
        positive = any(word in variable.name for word in ("var", "m2", "count"))
        shape = variable.shape
        variable.assign(rng.uniform(0.5, 2.0, shape) if positive else rng.normal(0.0, 0.4, shape))
    spec = policy.time_step_spec.observation
    x = rng.uniform(0, 1, (ROWS, *spec.shape)) if len(spec.shape) == 3 else rng.normal(0, 1.5, (ROWS, *spec.shape))
    x = x.astype(np.float32)
    step = ts.restart(tf.constant(x), batch_size=ROWS)
    actions = GreedyPolicy(policy).action(step).action.numpy()
    found = [np.asarray(y) for y in outputs(policy, step)]
    known = {f"y{i}": y for i, y in enumerate(found)}
    if isinstance(policy.distribution(step).action, tfp.distributions.MultivariateNormalDiag):
        known["std"] = policy.distribution(step).action.stddev().numpy()
    np.savez(os.path.join(OUT, f"{name}_io.npz"), x=x, a=actions, **known)
    PolicySaver(GreedyPolicy(policy) if greedy else policy).save(os.path.join(OUT, name))
    cases.append({"file": name, "io": f"{name}_io.npz", "options": options or {}})


def logits_value(policy, step):
    return policy.distribution(step).action.logits_parameter(), policy.apply_value_network(step.observation, ())[0][
        :, None
    ]


def mean_value(policy, step):
    return policy.distribution(step).action.loc, policy.apply_value_network(step.observation, ())[0][:, None]


def squashed(policy, step):
    normal = policy.distribution(step).action.input_distribution
    return np.concatenate([normal.mean(), np.log(normal.stddev())], 1), np.tanh(normal.mean())


def scaled(policy, step):
    return (((policy.distribution(step).action.loc - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2)),)


def clipped_exp(x):
    return tf.exp(tf.clip_by_value(x, -20, 2))


def old_sac(spec):
    """The projection of TF-Agents' examples of SAC."""
    return NormalProjectionNetwork(
        spec, mean_transform=None, state_dependent_std=True, std_transform=clipped_exp, scale_distribution=True
    )


vector, image = ts.time_step_spec(OBS), ts.time_step_spec(IMAGE)
tanh = tf.keras.activations.tanh
net = ActorDistributionNetwork(OBS, CHOICE, fc_layer_params=(8, 6), activation_fn=tanh)
value = ValueNetwork(OBS, fc_layer_params=(7,), activation_fn=tanh)
normaliser = StreamingTensorNormalizer(OBS, scope="normalize_observations")
policy = PPOPolicy(vector, CHOICE, net, value, observation_normalizer=normaliser, collect=False)
store("ppo_discrete", policy, logits_value, options={"activation": "tanh"})
net = ActorDistributionNetwork(OBS, VECTOR, fc_layer_params=(8, 6))
value = ValueNetwork(OBS, fc_layer_params=(7,))
policy = PPOPolicy(vector, VECTOR, net, value, observation_normalizer=EMATensorNormalizer(OBS), collect=True)
store("ppo_collect", policy, mean_value, greedy=False)
net = ActorDistributionNetwork(OBS, VECTOR, fc_layer_params=(8,), activation_fn=tf.nn.leaky_relu)
store("reinforce", ActorPolicy(vector, VECTOR, net), lambda policy, step: (policy.distribution(step).action.loc,))
net = ActorDistributionNetwork(
    OBS, VECTOR, fc_layer_params=(8, 6), continuous_projection_net=TanhNormalProjectionNetwork
)
store("sac", ActorPolicy(vector, VECTOR, net), squashed)
net = ActorDistributionNetwork(OBS, VECTOR, fc_layer_params=(8, 6), continuous_projection_net=old_sac)
store("sac_old", ActorPolicy(vector, VECTOR, net), squashed)
store("td3", ActorPolicy(vector, VECTOR, ActorNetwork(OBS, VECTOR, fc_layer_params=(8, 6))), scaled)
net = QNetwork(IMAGE, CHOICE, conv_layer_params=[(4, 8, 4), (5, 3, 1)], fc_layer_params=(8,), activation_fn=tf.nn.elu)
store("q_image", QPolicy(image, CHOICE, net), lambda policy, step: (net(step.observation)[0],))

# What has no template: code of the user's in front of the network, and a recurrent one.
net = QNetwork(OBS, CHOICE, preprocessing_layers=tf.keras.layers.Lambda(lambda x: x / 2), fc_layer_params=(8,))
PolicySaver(GreedyPolicy(QPolicy(vector, CHOICE, net))).save(os.path.join(OUT, "refused_lambda"))
with open(os.path.join(OUT, "cases.json"), "w") as file:
    json.dump(cases, file)
