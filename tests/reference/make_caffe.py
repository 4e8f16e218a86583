"""Networks of Caffe 1.0 with weights, and what they compute: python make_caffe.py FOLDER. See README.md beside it."""

import json
import os
import sys

import caffe
import numpy as np
from caffe import layers as L
from caffe import params as P

OUT = sys.argv[1]
caffe.set_mode_cpu()
caffe.set_random_seed(1)
rng = np.random.RandomState(0)
FILL = {"weight_filler": {"type": "xavier"}, "bias_filler": {"type": "gaussian", "std": 0.1}}
cases = []


def store(name, spec, out, x):
    path = os.path.join(OUT, name + ".prototxt")
    with open(path, "w") as file:
        file.write(str(spec.to_proto()))
    net = caffe.Net(path, caffe.TEST)
    net.blobs["obs"].data[...] = x
    found = net.forward()[out].copy()
    net.save(os.path.join(OUT, name + ".caffemodel"))
    np.savez(os.path.join(OUT, name + "_io.npz"), x=x, y0=found)
    cases.append({"file": name + ".prototxt", "io": name + "_io.npz"})


net = caffe.NetSpec()
net.obs = L.Input(shape={"dim": [5, 11]})
net.a = L.TanH(L.InnerProduct(net.obs, num_output=16, **FILL))
net.b = L.ELU(L.InnerProduct(net.a, num_output=12, **FILL))
net.out = L.InnerProduct(net.b, num_output=3, **FILL)
store("dense", net, "out", rng.normal(size=(5, 11)).astype("f"))
net = caffe.NetSpec()
net.obs = L.Input(shape={"dim": [5, 3, 21, 21]})
net.a = L.ReLU(L.Convolution(net.obs, num_output=6, kernel_size=4, stride=2, **FILL))
net.pool = L.Pooling(net.a, pool=P.Pooling.MAX, kernel_size=2, stride=2)
net.out = L.InnerProduct(net.pool, num_output=4, **FILL)
store("image", net, "out", rng.normal(size=(5, 3, 21, 21)).astype("f"))
with open(os.path.join(OUT, "cases.json"), "w") as file:
    json.dump(cases, file)
