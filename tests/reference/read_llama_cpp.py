"""What llama.cpp makes of GGUF files, in an interpreter that has llama-cpp-python.

    python read_llama_cpp.py < wish.json > found.json

The wish is {"file", "texts", "prompt", "num_new"}; found are the ids of each text (special tokens parsed) and what they become,
what is put around a text, special ids, every id that ends a text, logits after the prompt and its greedy continuation. With
{"file", "quantise_to": {path: number of a mixture}} it quantises instead.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp
import numpy as np


def quantise(wish):
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 1
    status = {}
    for out, kind in wish["quantise_to"].items():
        parameters.ftype = kind
        status[out] = llama_cpp.llama_model_quantize(wish["file"].encode(), out.encode(), ctypes.byref(parameters))
    return status


def read(wish):
    # Keys and values in float32 (type 0), as ours are for a model in float32.
    model = llama_cpp.Llama(
        wish["file"],
        n_ctx=256,
        n_batch=256,
        n_threads=1,
        type_k=0,
        type_v=0,
        logits_all=True,
        verbose=False,
        vocab_only=not wish["prompt"],
    )
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    found = {
        "ids": [model.tokenize(text.encode(), add_bos=False, special=True) for text in wish["texts"]],
        "around": model.tokenize(b"a", add_bos=True, special=True),
        "special": {
            name: getattr(llama_cpp, f"llama_vocab_{name}")(vocab)
            for name in ("bos", "eos", "eot", "pad", "get_add_bos")
        },
        "ends": [index for index in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, index)],
        "num_tokens": model.n_vocab(),
        "template": model.metadata.get("tokenizer.chat_template"),
        "detokenised": [
            model.detokenize(model.tokenize(t.encode(), add_bos=False, special=True)).decode("utf-8", "replace")
            for t in wish["texts"]
        ],
    }
    if wish["prompt"]:
        model.eval(wish["prompt"])
        found["logits"] = model.scores[model.n_tokens - 1].tolist()
        found["greedy"] = []
        for _ in range(wish["num_new"]):
            token = int(np.argmax(model.scores[model.n_tokens - 1]))
            found["greedy"].append(token)
            model.eval([token])
    return found


wish = json.load(sys.stdin)
json.dump(quantise(wish) if "quantise_to" in wish else read(wish), sys.stdout)
