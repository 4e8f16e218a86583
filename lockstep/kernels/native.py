"""Finds the compiled kernels, picks the build for this processor and says which implementation an op takes.

The library is optional: without it every op runs its naive twin and one warning says so at the first use.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lockstep.core import env
from lockstep.core.errors import ConfigError, InputError, unknown_name

LEVELS = ("portable", "avx2", "avx512", "avx512bf16")
MODES = ("auto", "naive", "traceable", "opaque", "triton")
NATIVE_FOLDER = Path(__file__).parent / "_native"
SOURCE_FOLDER = Path(__file__).parents[2] / "csrc"
"""Of a checkout; an installed package has none, and its own libraries."""

Mode = Literal["auto", "naive", "traceable", "opaque", "triton"]

_P, _I64, _I32, _F32, _F64, _U64 = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_float,
    ctypes.c_double,
    ctypes.c_uint64,
)

# name -> (argument types, result type); the meaning of each argument is in csrc/lockstep.h.
SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "ls_cpu_level": ([], _I32),
    "ls_built_level": ([], _I32),
    "ls_interface": ([], _I32),
    "ls_set_num_threads": ([_I32], None),
    "ls_num_threads": ([], _I32),
    "ls_mlp_forward": ([_P, _P, _P, _P, _I64, _I32], None),
    "ls_mlp_backward": ([_P, _P, _P, _P, _P, _P, _P, _P, _I64, _I32], None),
    "ls_categorical_evaluate": ([_P, _P, _P, _P, _I64, _P, _I64], _I64),
    "ls_categorical_backward": ([_P, _P, _P, _P, _P, _I64, _P, _I64], None),
    "ls_categorical_sample": ([_P, _P, _P, _P, _I64, _P, _I64], None),
    "ls_gaussian_evaluate": ([_P, _P, _I64, _P, _P, _P, _I64, _I64], None),
    "ls_gaussian_backward": ([_P, _P, _I64, _P, _P, _P, _P, _P, _I64, _I64], None),
    "ls_gaussian_sample": ([_P, _P, _I64, _P, _P, _P, _I64, _I64], None),
    "ls_squashed_sample": ([_P, _P, _I64, _F32, _F32, _P, _P, _P, _I64, _I64], None),
    "ls_squashed_backward": ([_P, _I64, _F32, _F32] + [_P] * 6 + [_I64, _I64], None),
    "ls_lstm_gates": ([_P] * 4 + [_I64] * 2, None),
    "ls_lstm_gates_backward": ([_P] * 7 + [_I64] * 2, None),
    "ls_gru_gates": ([_P] * 4 + [_I64] * 2, None),
    "ls_gru_gates_backward": ([_P] * 7 + [_I64] * 2, None),
    "ls_lstm_sequence": ([_P] * 11 + [_I64] * 3, None),
    "ls_lstm_sequence_backward": ([_P] * 14 + [_I64] * 3, None),
    "ls_gru_sequence": ([_P] * 8 + [_I64] * 3, None),
    "ls_gru_sequence_backward": ([_P] * 12 + [_I64] * 3, None),
    "ls_ppo_surrogate": ([_P] * 8 + [_F32] * 4 + [_I64] + [_P] * 5, None),
    "ls_adam": ([_P] * 5 + [_I64] + [_F64] * 5 + [_I64, _F64], _F64),
    "ls_polyak": ([_P, _P, _P, _I64, _F32], None),
    "ls_gae": ([_P] * 6 + [_F32, _F32, _P, _I64, _I64], None),
    "ls_discounted_return": ([_P, _P, _P, _F32, _P, _P, _I64, _I64], None),
    "ls_vtrace": ([_P] * 7 + [_F32] * 4 + [_P, _P, _I64, _I64], None),
    "ls_nstep_returns": ([_P] * 5 + [_I64, _I64, _F32, _P, _P, _P, _I64, _I64, _I64], None),
    "ls_philox": ([_P, _P, _P], None),
    "ls_noise_bits": ([_U64, _P, _P, _P, _I64, _I64], None),
    "ls_uniform": ([_U64, _P, _P, _P, _I64, _I64], None),
    "ls_normal": ([_U64, _P, _P, _P, _I64, _I64], None),
    "ls_plan_run": ([_P, _P, _U64, _P, _P, _I32], None),
    "ls_actor_critic_gradients": ([_P, _P, _I64, _P], _I64),
    "ls_q_gradients": ([_P, _P, _P, _I64, _P, _P], _I64),
    "ls_sac_memory": ([_P, _I64], _I64),
    "ls_sac_critic_gradients": ([_P, _P, _P, _F32, _I64, _P, _P], _I64),
    "ls_sac_actor_gradients": ([_P, _P, _F32, _I64, _P], None),
    "ls_uniform_index": ([_U64, _I64, _I64, _I64, _P, _I64], None),
    "ls_normalise": ([_P, _P, _P, _I64], None),
    "ls_sumtree_update": ([_P, _P, _I64, _P, _P, _I64], None),
    "ls_sumtree_find": ([_P, _I64, _P, _P, _I64], None),
    "ls_packed_linear": ([_P] * 5 + [_I64], None),
    "ls_grouped_linear": ([_P] * 3 + [_I64] + [_P] * 3, None),
    "ls_pack_float": ([_P, _P, _I32, _P], None),
    "ls_scan_blocks": ([_I32, _P, _I64, _I64], _I32),
    "ls_pack_blocks": ([_I32, _P, _P, _P], None),
    "ls_unpack_rows": ([_P] * 3 + [_I64, _P], None),
    "ls_low_rank": ([_P] * 3 + [_I64] * 3, None),
    "ls_advise_huge_pages": ([_P, _I64], None),
    "ls_peak_operations": ([_I32, _I64, _I64], _F64),
    "ls_read_memory": ([_P, _I64], _I64),
    "ls_decoder": ([_P] * 3 + [_I64, _P], _I64),
    "ls_decoder_scratch": ([_P], _I64),
    "ls_gather_rows": ([_P, _P, _P, _I64, _P, _I64], None),
    "ls_attention": ([_P], _I64),
    "ls_attention_backward": ([_P], None),
    "ls_token_logprobs": ([_P] * 2 + [_F32, _P] + [_I64] * 2, _I64),
    "ls_token_logprobs_backward": ([_P] * 2 + [_F32] + [_P] * 2 + [_I64] * 2, None),
    "ls_top_logprobs": ([_P, _I64] + [_P] * 2 + [_I64] * 2, _I64),
    "ls_sample_tokens": ([_P], _I64),
    "ls_score_tokens": ([_P, _P], _I64),
    "ls_rms_norm": ([_P] * 3 + [_F32] * 2 + [_P] * 2 + [_I64] * 2, None),
    "ls_layer_norm": ([_P] * 3 + [_F32, _P] + [_I64] * 2, None),
    "ls_norm_backward": ([_P] * 2 + [_F32] * 2 + [_P] * 5 + [_I64] * 2 + [_I32], None),
    "ls_rope": ([_P, _I64] + [_P] * 4 + [_I64] * 5 + [_I32, _F32], _I64),
    "ls_activate": ([_P] * 2 + [_I64, _I32], None),
    "ls_activate_backward": ([_P] * 3 + [_I64, _I32], None),
    "ls_gated": ([_P] * 2 + [_I64] * 2 + [_I32], None),
    "ls_gated_backward": ([_P] * 3 + [_I64] * 2 + [_I32], None),
}


def open_level(level: int, *, hold_gil: bool = False) -> ctypes.CDLL:
    """The build of one instruction-set level, with typed functions.

    Raises:
        OSError: the file is missing or cannot be loaded.
        AttributeError: in a checkout, the file was compiled from other headers than those of its `csrc`.
    """
    path = str(NATIVE_FOLDER / _file_of(level))
    library: ctypes.CDLL = ctypes.PyDLL(path) if hold_gil else ctypes.CDLL(path)
    for name, (arguments, result) in SIGNATURES.items():
        function = library[name]
        function.argtypes = arguments
        function.restype = result
        setattr(library, name, function)
    headers = sorted(SOURCE_FOLDER.glob("*.h"))
    # A struct that has changed would be read at the wrong places.
    if (
        SOURCE_FOLDER.joinpath("lockstep.h") in headers
        and library.ls_interface() != zlib.crc32(b"".join(map(Path.read_bytes, headers))) & 0x7FFFFFFF
    ):
        raise AttributeError("its functions take other arguments")
    return library


def _file_of(level: int) -> str:
    return f"liblockstep_{LEVELS[level]}.so"


def _why(error: OSError | AttributeError) -> str:
    """Why a library cannot be used: it is not there, or it was built from earlier sources and lacks a function."""
    if isinstance(error, AttributeError):
        return f"the compiled kernels are older than this package, pull and build belong together: {error}"
    return f"no compiled kernels: {error}"


class _State:
    """What this process runs on. `fast` is read on every call of every op."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.library_holding_gil: ctypes.CDLL | None = None
        self.level = -1
        self.reason = ""
        self.mode: Mode = "auto"
        self.warned = False
        self._load()
        self.fast = self.library is not None and not env.debug_naive()

    def _load(self) -> None:
        try:
            best = open_level(0).ls_cpu_level()
        except (OSError, AttributeError) as error:
            self.reason = _why(error)
            return
        for level in range(best, -1, -1):
            try:
                self.library = open_level(level)
                self.library_holding_gil = open_level(level, hold_gil=True)
            except (OSError, AttributeError) as error:
                self.reason = _why(error)
                continue
            self.level = level
            self.reason = (
                "" if level == best else f"the {LEVELS[best]} build could not be loaded; reinstall lockstep-rl"
            )
            return


state = _State()


def lib() -> ctypes.CDLL:
    """The loaded library; call only after `choose` or `usable` has said that there is one."""
    assert state.library is not None
    return state.library


def usable() -> bool:
    """True if ops take the compiled path; warns once when they cannot."""
    if state.fast:
        return True
    if state.library is None and state.mode == "auto" and not state.warned:
        state.warned = True
        warnings.warn(
            f"lockstep runs on its naive kernels, which are slow ({state.reason}); "
            "with a C++ compiler reinstall lockstep-rl to build the fast ones (in a checkout: pip install "
            "--no-build-isolation -e .)",
            RuntimeWarning,
            stacklevel=3,
        )
    return False


def choose(tensor: Tensor, *, has_triton: bool = False) -> str:
    """Key of the implementation for an op on `tensor`: "cpu" for float32 on the CPU; "triton" for float32 on a GPU where
    the op has such a version and Triton is installed; else "naive"."""
    if tensor.dtype is torch.float32 and tensor.is_cpu and usable():
        return "cpu"
    if has_triton and tensor.dtype is torch.float32 and (state.mode == "triton" or _on_gpu(tensor)):
        return "triton"
    return "opaque" if state.mode == "opaque" else "naive"


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda and state.mode == "auto" and find_spec("triton") is not None and not env.debug_naive()


@contextlib.contextmanager
def force(mode: Mode) -> Iterator[None]:
    """Within the context every op takes one implementation.

    "naive" is the reference; "traceable" is the reference with whole matrix products, for `torch.export` and ONNX,
    which would otherwise record one node per reduction step; "opaque" records each op as one custom operator that runs
    the usual implementation when the saved program is called; "triton" takes the GPU's kernels where an op has one, on the
    CPU too, where only Triton's interpreter (TRITON_INTERPRET=1) runs them; "auto" is the usual choice.

    >>> with force("naive"):
    ...     state.fast
    False
    """
    if mode not in MODES:
        raise ConfigError(unknown_name("kernel mode", mode, MODES))
    before = state.mode, state.fast
    state.mode = mode
    state.fast = mode == "auto" and state.library is not None and not env.debug_naive()
    try:
        yield
    finally:
        state.mode, state.fast = before


def set_num_threads(num_threads: int) -> None:
    """Threads that one kernel call may use, the caller included (0: `num_processors`); results do not depend on it.

    PyTorch's own pool is set to one thread: its workers spin for a while after each of its operations, and on the same
    cores that cost SAC on two threads a quarter of its speed (105 against 141 steps/s in fp32, 125 against 168 in bf16).

    Raises:
        ConfigError: for a number below 0.
    """
    if num_threads < 0:
        raise ConfigError(f"num_threads={num_threads}; expected at least 1, or 0 for one a processor")
    torch.set_num_threads(1)
    if state.library is not None:
        state.library.ls_set_num_threads(num_threads or num_processors())
        # A second handle on the same file is the same library: one pool.


def num_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def num_threads() -> int:
    """Threads that one kernel call may use."""
    return int(state.library.ls_num_threads()) if state.library is not None else 1


def describe() -> dict[str, str | int | bool]:
    """Facts for a run's record: implementation, instruction set, bf16 dot products, threads, library file or reason.

    The file is named without its folder: records are compared and published, and folders differ between machines.
    """
    found = state.library is not None
    return {
        "implementation": "cpu" if state.fast else "naive",
        "level": LEVELS[state.level] if found else "none",
        "bf16": state.level == 3,
        "num_threads": num_threads(),
        "library": _file_of(state.level) if found else "",
        "reason": state.reason,
    }


def contiguous(tensor: Tensor) -> Tensor:
    """`tensor` itself where it is contiguous: the call costs less than `.contiguous()`."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def refuse_double_backward() -> None:
    """Called by every compiled backward pass. Cheaper than torch's decorator of the same purpose, which a small network
    would feel."""
    if torch.is_grad_enabled():
        raise InputError(
            "the compiled kernels are differentiable once and create_graph=True asked for more; "
            "compute this loss within kernels.force('naive')"
        )


def address_array(addresses: list[int | None]) -> ctypes.Array[ctypes.c_void_p]:
    """A C array of pointers."""
    return (ctypes.c_void_p * len(addresses))(*addresses)
