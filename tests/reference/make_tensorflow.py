"""Graphs and checkpoints of TensorFlow 1 and 2, with what they compute: python make_tensorflow.py FOLDER"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import tensorflow as tf

OUT = sys.argv[1]
rng = np.random.default_rng(0)
cases = []


def weights(*shape):
    return rng.normal(0, 1 / np.sqrt(np.prod(shape[:-1])), shape).astype(np.float32)


def store(name, x, outputs):
    np.savez(os.path.join(OUT, f"{name}_io.npz"), x=x, **{f"y{i}": np.asarray(y) for i, y in enumerate(outputs)})


class Images(tf.Module):
    """Convolutions with padding SAME, and two heads."""

    def __init__(self):
        super().__init__()
        shapes = {"c1": (4, 4, 3, 6), "b1": (6,), "c2": (3, 3, 6, 8), "w": (3 * 3 * 8, 16), "p": (16, 4), "v": (16, 1)}
        for name, shape in shapes.items():
            setattr(self, name, tf.Variable(weights(*shape), name=name))

    @tf.function(input_signature=[tf.TensorSpec((None, 12, 12, 3), tf.float32, "obs")])
    def __call__(self, obs):
        x = tf.nn.relu(tf.nn.conv2d(obs, self.c1, 2, "SAME") + self.b1)
        x = tf.nn.elu(tf.nn.conv2d(x, self.c2, 2, "SAME"))
        x = tf.nn.tanh(tf.reshape(x, [-1, 72]) @ self.w)
        return {"policy": tf.nn.softmax(x @ self.p), "value": x @ self.v}


module = Images()
x = rng.normal(size=(5, 12, 12, 3)).astype(np.float32)
found = module(tf.constant(x))
store("images", x, [found["policy"], found["value"]])
tf.saved_model.save(module, os.path.join(OUT, "images"), signatures={"serving_default": module.__call__})
cases.append({"file": "images", "io": "images_io.npz"})


class Dense(tf.Module):
    """A chain, whose checkpoint is read by its variables."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1, self.w2, self.b2 = (tf.Variable(weights(*s)) for s in ((6, 16), (16,), (16, 3), (3,)))

    def __call__(self, x):
        return tf.nn.tanh(x @ self.w1 + self.b1) @ self.w2 + self.b2


chain = Dense()
x = rng.normal(size=(5, 6)).astype(np.float32)
store("chain", x, [chain(tf.constant(x))])
tf.train.Checkpoint(policy=chain).write(os.path.join(OUT, "chain"))
cases.append({"file": "chain.index", "io": "chain_io.npz", "options": {"activation": "tanh"}})

v1 = tf.compat.v1
with tf.Graph().as_default(), v1.Session() as session:
    obs = v1.placeholder(tf.float32, (None, 6), "obs")
    # TensorFlow 1 made reference variables; a meta graph of resource variables is refused by tf2onnx.
    kernels = [
        v1.get_variable(name, initializer=weights(*shape), use_resource=False)
        for name, shape in (("pi/w", (6, 16)), ("pi/w2", (16, 3)))
    ]
    action = tf.identity(tf.tanh(obs @ kernels[0]) @ kernels[1], "action")
    session.run(v1.global_variables_initializer())
    store("tf1", x, [session.run(action, {obs: x})])
    v1.train.Saver().save(session, os.path.join(OUT, "tf1.ckpt"))
    frozen = v1.graph_util.convert_variables_to_constants(session, session.graph.as_graph_def(), ["action"])
    with open(os.path.join(OUT, "tf1.pb"), "wb") as file:
        file.write(frozen.SerializeToString())
cases += [{"file": "tf1.pb", "io": "tf1_io.npz"}, {"file": "tf1.ckpt.meta", "io": "tf1_io.npz"}]
with open(os.path.join(OUT, "cases.json"), "w") as file:
    json.dump(cases, file)
