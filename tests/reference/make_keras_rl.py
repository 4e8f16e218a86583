"""Weights that agents of Keras-RL save, with what their networks compute: python make_keras_rl.py FOLDER

Written for Keras-RL 0.4.2 with Keras 2.2.4 on TensorFlow 1.14, Python 3.7; see README.md beside it.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
from keras.layers import Activation, Concatenate, Dense, Flatten, Input
from keras.models import Model, Sequential
from keras.optimizers import Adam
from rl.agents import DDPGAgent
from rl.agents.dqn import DQNAgent
from rl.memory import SequentialMemory
from rl.policy import EpsGreedyQPolicy

OUT = sys.argv[1]
rng = np.random.RandomState(0)
cases = []


def memory():
    return SequentialMemory(limit=100, window_length=1)


def store(name, model, x):
    with open(os.path.join(OUT, f"{name}.json"), "w") as file:
        file.write(model.to_json())
    np.savez(os.path.join(OUT, f"{name}_io.npz"), x=x.astype("f"), y0=model.predict(x))
    cases.append({"file": f"{name}.h5f", "io": f"{name}_io.npz", "paths": {"config": f"{name}.json"}})


Dense(3)  # a layer made before, so that names do not begin at 1
dense = [layer for size in (16, 12) for layer in (Dense(size), Activation("relu"))]
model = Sequential([Flatten(input_shape=(1, 4)), *dense, Dense(2), Activation("linear")])
agent = DQNAgent(model=model, nb_actions=2, memory=memory(), policy=EpsGreedyQPolicy())
agent.compile(Adam(lr=1e-3), metrics=["mae"])
agent.model.set_weights([rng.normal(0, 0.5, w.shape) for w in agent.model.get_weights()])
agent.save_weights(os.path.join(OUT, "krl_dqn.h5f"), overwrite=True)
store("krl_dqn", agent.model, rng.normal(size=(5, 1, 4)))
actor = Sequential([Flatten(input_shape=(1, 3)), Dense(8), Activation("relu"), Dense(1), Activation("tanh")])
action, obs = Input(shape=(1,), name="action_input"), Input(shape=(1, 3), name="observation_input")
hidden = Activation("relu")(Dense(8)(Concatenate()([action, Flatten()(obs)])))
critic = Model(inputs=[action, obs], outputs=Dense(1)(hidden))
agent = DDPGAgent(nb_actions=1, actor=actor, critic=critic, critic_action_input=action, memory=memory())
agent.compile(Adam(lr=1e-3), metrics=["mae"])
agent.actor.set_weights([rng.normal(0, 0.5, w.shape) for w in agent.actor.get_weights()])
agent.save_weights(os.path.join(OUT, "krl_ddpg.h5f"), overwrite=True)
store("krl_ddpg_actor", agent.actor, rng.normal(size=(5, 1, 3)))
with open(os.path.join(OUT, "cases.json"), "w") as file:
    json.dump(cases, file)
