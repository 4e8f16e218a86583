"""Networks of MXNet's Gluon as symbol and parameters, with what they compute: python make_mxnet.py FOLDER

Written for MXNet 1.9.1 on Python 3.8; see README.md beside it.
"""

from __future__ import annotations

import json
import os
import sys

import mxnet as mx
import numpy as np
from mxnet import gluon, nd

OUT = sys.argv[1]
mx.random.seed(0)
rng = np.random.RandomState(0)
cases = []


def store(name, net, x, axis=0, steps=None, options=None):
    net.initialize(mx.init.Normal(0.3))
    net.hybridize()
    y = net(nd.array(x))
    np.savez(os.path.join(OUT, f"{name}_io.npz"), x=x, y0=y.asnumpy())
    net.export(os.path.join(OUT, name))
    case = {"file": f"{name}-symbol.json", "io": f"{name}_io.npz", "axis": axis, "steps": steps}
    cases.append({**case, "options": options or {}})


class Steps(gluon.HybridBlock):
    def __init__(self, core):
        super().__init__()
        with self.name_scope():
            self.core, self.out = core, gluon.nn.Dense(4, flatten=False)

    def hybrid_forward(self, F, x):
        return self.out(self.core(x))


nn = gluon.nn
net = nn.HybridSequential()
net.add(nn.Dense(16, "tanh"), nn.LayerNorm(), nn.Dense(12), nn.LeakyReLU(0.1), nn.Dense(3))
store("dense", net, rng.normal(size=(5, 11)).astype("f"))
net = nn.HybridSequential()
net.add(nn.Conv2D(6, 4, 2, activation="relu"), nn.BatchNorm(), nn.MaxPool2D(2), nn.Flatten(), nn.Dense(4))
store("image", net, rng.normal(size=(5, 3, 20, 20)).astype("f"), options={"shapes": "data=3,20,20"})
for name, core in (("lstm", gluon.rnn.LSTM(7)), ("gru", gluon.rnn.GRU(7))):
    store(name, Steps(core), rng.normal(size=(6, 5, 8)).astype("f"), axis=1, steps=0)
with open(os.path.join(OUT, "cases.json"), "w") as file:
    json.dump(cases, file)
