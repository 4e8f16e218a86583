"""Programs and weights of PaddlePaddle 3, with what they compute: python make_paddle.py FOLDER"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import paddle
from paddle import nn
from paddle.static import InputSpec

OUT = sys.argv[1]
paddle.seed(0)
rng = np.random.default_rng(0)
cases = []


def store(name, net, x, shape, *, steps=None):
    net.eval()
    found = net(paddle.to_tensor(x))
    found = found if isinstance(found, list | tuple) else [found]
    np.savez(os.path.join(OUT, f"{name}_io.npz"), x=x, **{f"y{i}": y.numpy() for i, y in enumerate(found)})
    paddle.save(net.state_dict(), os.path.join(OUT, f"{name}.pdparams"))
    paddle.jit.save(net, os.path.join(OUT, name), input_spec=[InputSpec(shape, "float32", "obs")])
    for ending in (".json", ".pdparams"):
        cases.append({"file": name + ending, "io": f"{name}_io.npz", "steps": steps})


class Dense(nn.Layer):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(11, 16), nn.LayerNorm(16), nn.Linear(16, 12)
        self.mean, self.value = nn.Linear(12, 3), nn.Linear(12, 1)

    def forward(self, x):
        x = nn.functional.gelu(self.b(self.norm(paddle.tanh(self.a(x)))))
        return paddle.tanh(self.mean(x)), self.value(x)


class Images(nn.Layer):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2D(3, 6, 4, 2, padding=1), nn.BatchNorm2D(6), nn.Linear(6 * 5 * 5, 4)

    def forward(self, x):
        x = nn.functional.max_pool2d(nn.functional.relu(self.norm(self.conv(x))), 2)
        return self.out(paddle.flatten(x, 1))


class Steps(nn.Layer):
    def __init__(self, kind):
        super().__init__()
        self.core, self.out = kind(8, 7), nn.Linear(7, 4)

    def forward(self, x):
        return self.out(self.core(x)[0])


store("dense", Dense(), rng.normal(size=(5, 11)).astype("f"), [None, 11])
store("image", Images(), rng.normal(size=(5, 3, 20, 20)).astype("f"), [None, 3, 20, 20])
store("lstm", Steps(nn.LSTM), rng.normal(size=(5, 6, 8)).astype("f"), [None, None, 8], steps=1)
store("gru", Steps(nn.GRU), rng.normal(size=(5, 6, 8)).astype("f"), [None, None, 8], steps=1)
with open(os.path.join(OUT, "cases.json"), "w") as file:
    json.dump(cases, file)
