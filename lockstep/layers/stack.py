"""The layers of a decoder one after another: op by op where gradients or odd layers ask for it, else in one compiled call.

Legend: T packed tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lockstep.core.batch import ForwardBatch
from lockstep.kernels import native
from lockstep.kernels.attention import KVCache
from lockstep.kernels.decoder import MAX_PACKS, DecoderStack, FinalNorm, LayerParts, LinearParts, StackSizes
from lockstep.kernels.packed_linear import PackedWeight
from lockstep.layers.attention import Attention
from lockstep.layers.decoder import PreNormLayer, SandwichLayer, Stream, open_stream
from lockstep.layers.gated import GatedMLP
from lockstep.layers.projection import Projection, adapter_runs
from lockstep.layers.recompute import run_layer
from lockstep.layers.rotary import Angles
from lockstep.layers.token_norm import RMSNorm

Layer = PreNormLayer | SandwichLayer


class DecoderLayers(nn.ModuleList):
    """A module list that runs itself. The compiled call makes the calls that the layers make: one set of bits.

    What it keeps of the weights follows `Projection.packs`, moves and state dicts. Whoever puts other tensors into
    parameters behind the modules' backs calls `forget`.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.recompute = False
        """See `LanguageModel.recompute_layers`."""
        self._list = list(layers)
        self._seen: list[tuple[Projection, list[PackedWeight]]] = []
        self._stack: DecoderStack | None = None
        self._one_call = all(
            isinstance(layer.mlp, GatedMLP) and isinstance(layer.attention, Attention) for layer in self._list
        )
        self.register_load_state_dict_post_hook(lambda module, _: module.forget())

    def run(
        self, x_TE: Tensor, norm: RMSNorm, batch: ForwardBatch, angles: Sequence[Angles], cache: KVCache | None
    ) -> Tensor:
        """The embedded tokens -> the hidden state after all layers and `norm`; `angles` for each layer."""
        if self._one_call and cache is not None and not torch.is_grad_enabled() and native.choose(x_TE) == "cpu":
            stack = self._compiled()
            if stack is not None:
                runs = [adapter_runs(one.path, batch.adapters) for one, _ in self._seen] if batch.adapters else []
                final = FinalNorm(norm.weight.detach(), norm.eps, norm.offset)
                return stack.run(x_TE, final, batch, angles, cache.layers, runs)
        stream: Stream = x_TE, None
        for index, layer in enumerate(self._list):
            place = cache.layers[index] if cache else None
            stream = run_layer(layer, self.recompute, stream, batch, angles[index], place)
        return open_stream(stream, norm)[0]

    def forget(self) -> None:
        """The tensors of parameters have changed: read their addresses again."""
        self._stack, self._seen = None, []

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads addresses of its own."""
        return {**self.__dict__, "_stack": None, "_seen": []}

    def _compiled(self) -> DecoderStack | None:
        stale = self._stack is None
        for projection, seen in self._seen:
            if projection.packs() is not seen:
                stale = True
        if stale:
            linears = [linear for layer in self._list for linear in _linears(layer)]
            self._seen = [(linear, linear.packs()) for linear in linears]
            self._stack = None
            if all(1 <= len(packs) <= MAX_PACKS for _, packs in self._seen):
                self._stack = DecoderStack(_sizes(self._list[0]), [_parts(layer) for layer in self._list])
        return self._stack

    def _apply(self, fn: Any, recurse: bool = True) -> DecoderLayers:
        """Moving a module replaces the tensors of its parameters."""
        self.forget()
        super()._apply(fn, recurse)
        return self


def _linears(layer: Layer) -> tuple[Projection, ...]:
    assert isinstance(layer.mlp, GatedMLP)
    assert isinstance(layer.attention, Attention)
    return layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down


def _sizes(layer: Layer) -> StackSizes:
    assert isinstance(layer.attention, Attention)
    attention, mlp = layer.attention.config, layer.mlp
    assert isinstance(mlp, GatedMLP)
    return StackSizes(
        width=attention.width,
        num_heads=attention.num_heads,
        kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        hidden=mlp.down.in_size,
        gate=mlp.kind,
    )


def _parts(layer: Layer) -> LayerParts:
    assert isinstance(layer.attention, Attention)
    config, attention = layer.attention.config, layer.attention
    qkv, out, gate_up, down = (LinearParts(tuple(one.packs()), _detached(one.bias)) for one in _linears(layer))
    sandwich = layer if isinstance(layer, SandwichLayer) else None
    return LayerParts(
        attention_norm=layer.attention_norm.weight.detach(),
        attention_out_norm=_weight(sandwich.attention_out_norm if sandwich else None),
        mlp_norm=layer.mlp_norm.weight.detach(),
        mlp_out_norm=_weight(sandwich.mlp_out_norm if sandwich else None),
        q_norm=_weight(attention.q_norm),
        k_norm=_weight(attention.k_norm),
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
        eps=layer.attention_norm.eps,
        offset=layer.attention_norm.offset,
        qk_eps=config.qk_norm_eps or 0.0,
        qk_offset=config.qk_norm_offset,
        scale=config.scale,
        softcap=config.softcap,
        window=config.window,
    )


def _weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight.detach()


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
