"""Models of Keras 3 on TensorFlow in its three formats, with what they compute: python make_keras.py FOLDER"""

from __future__ import annotations

import json
import os
import sys

import keras
import numpy as np
from keras import layers

OUT = sys.argv[1]
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
cases = []


def store(name, model, x, *, steps=None):
    model.set_weights([w + rng.uniform(0.0, 0.2, w.shape) for w in model.get_weights()])
    found = model(x)
    found = found if isinstance(found, list | tuple) else [found]
    np.savez(os.path.join(OUT, f"{name}_io.npz"), x=x, **{f"y{i}": np.asarray(y) for i, y in enumerate(found)})
    for ending in (".keras", ".h5"):
        model.save(os.path.join(OUT, name + ending))
    model.save_weights(os.path.join(OUT, f"{name}.weights.h5"))
    with open(os.path.join(OUT, f"{name}.json"), "w") as file:
        file.write(model.to_json())
    for ending, paths in ((".keras", {}), (".h5", {}), (".weights.h5", {"config": f"{name}.json"})):
        cases.append({"file": name + ending, "io": f"{name}_io.npz", "paths": paths, "steps": steps})


obs = keras.Input((11,), name="obs")
x = layers.LayerNormalization()(layers.Dense(16, "tanh")(obs))
x = layers.Concatenate()([layers.Dense(8, "elu")(x), layers.Dense(4, "swish")(x)])
store(
    "dense", keras.Model(obs, [layers.Dense(3, "softmax")(x), layers.Dense(1)(x)]), rng.normal(size=(5, 11)).astype("f")
)
obs = keras.Input((20, 20, 3))
x = layers.Conv2D(6, 4, 2, activation="relu")(layers.Rescaling(1 / 255)(obs))
x = layers.Flatten()(layers.MaxPooling2D()(layers.BatchNormalization()(layers.Conv2D(5, 3, padding="same")(x))))
store("image", keras.Model(obs, layers.Dense(4)(x)), rng.integers(0, 256, (5, 20, 20, 3)).astype("f"))
for name, kind in (("lstm", layers.LSTM), ("gru", layers.GRU)):
    obs = keras.Input((None, 8))
    x = kind(7, return_sequences=True)(obs)
    store(name, keras.Model(obs, layers.Dense(4)(x)), rng.normal(size=(5, 6, 8)).astype("f"), steps=1)
model = keras.Sequential([keras.Input((6, 8)), layers.Bidirectional(layers.LSTM(5)), layers.Dense(4)])
store("both", model, rng.normal(size=(5, 6, 8)).astype("f"))
with open(os.path.join(OUT, "cases.json"), "w") as file:
    json.dump(cases, file)
