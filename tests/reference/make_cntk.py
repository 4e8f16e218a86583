"""Models of CNTK 2.7, with what they compute: python make_cntk.py FOLDER. For Python 3.6; see README.md beside it."""

import json
import os
import sys

import cntk as C
import numpy as np

OUT = sys.argv[1]
C.cntk_py.set_fixed_random_seed(1)
rng = np.random.RandomState(0)
cases = []


def store(name, net, obs, x, steps=None):
    net.save(os.path.join(OUT, name + ".model"))
    found = net.eval({obs: x if steps is None else list(x)})
    found = np.stack([np.asarray(row) for row in found]) if steps is not None else found
    np.savez(os.path.join(OUT, name + "_io.npz"), x=x, y0=np.asarray(found, np.float32))
    cases.append({"file": name + ".model", "io": name + "_io.npz", "steps": steps})


dense, layers = C.layers.Dense, C.layers
obs = C.input_variable(11, name="obs")
net = layers.Sequential([dense(16, C.tanh, init_bias=0.1), dense(12, C.elu), dense(3)])
store("dense", net(obs), obs, rng.normal(size=(5, 11)).astype("f"))
obs = C.input_variable((3, 20, 20), name="obs")
net = layers.Sequential([layers.Convolution2D((4, 4), 6, C.relu, strides=2), layers.MaxPooling((2, 2), 2), dense(4)])
store("image", net(obs), obs, rng.normal(size=(5, 3, 20, 20)).astype("f"))
for name, core in (("lstm", layers.LSTM(7)), ("gru", layers.GRU(7))):
    obs = C.sequence.input_variable(8, name="obs")
    net = layers.Sequential([layers.Recurrence(core), dense(4)])
    store(name, net(obs), obs, rng.normal(size=(5, 6, 8)).astype("f"), steps=1)
with open(os.path.join(OUT, "cases.json"), "w") as file:
    json.dump(cases, file)
