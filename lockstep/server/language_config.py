"""What the operator of a language-model server chooses."""

from __future__ import annotations

from dataclasses import dataclass, field

from lockstep.core.errors import ConfigError, unknown_name
from lockstep.engine.config import EngineConfig
from lockstep.engine.pooling import Pooling

DTYPES = ("auto", "fp32", "bf16", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Limits and times of a language-model server.

    >>> LanguageConfig(port=0).drain_s
    20.0
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """TCP port; 0 takes a free one and prints it."""
    served_name: str = ""
    """Name that clients give as `model`; empty: the last part of the path."""
    dtype: str = "auto"
    """Of the weights: auto, fp32, bf16, int8 or int4."""
    draft: str = ""
    """A small model of the same vocabulary that guesses ahead: a GGUF file, a folder or a hub id; texts stay the same."""
    kv_memory_mib: int | None = None
    """Memory for keys and values, in MiB; None: half of what is free once the weights are loaded."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Scheduling, pages and limits of the engine."""
    lora: tuple[str, ...] = ()
    """Low-rank adapters to serve from the start, each NAME=PATH of a PEFT folder; clients give NAME as `model`."""
    admin: bool = False
    """Serve the routes that change the server: adapters, weights, pause, sleep. Whoever reaches the port may use them, or
    whoever has the API key."""
    chat_template: str | None = None
    """Name of one of the tokenizer's templates or of a built-in one (chatml, llama-2, plain), or a template's text."""
    tool_format: str | None = None
    """How the model writes tool calls: hermes, llama3, mistral, pythonic; None: as its chat template shows."""
    pooling: Pooling = Pooling.LAST
    """Which hidden states make an embedding."""
    num_threads: int | None = None
    """Threads of the model; None: as many as there are cores."""
    max_body_bytes: int = 16 * 2**20
    """Largest request body, in bytes, compressed or not; beyond it a request is answered 413."""
    max_connections: int = 4096
    """Open connections and running requests; beyond it a request is answered 503."""
    body_timeout_s: float = 10.0
    """A request's body must arrive within this time, in seconds."""
    reload_every_s: float = 2.0
    """How often the directory of a run that is served is looked at for newer weights, in seconds; 0: never. Other models
    change by the routes of `admin` only."""
    drain_s: float = 20.0
    """After SIGTERM, time for running requests to finish, in seconds; new ones are answered 503 meanwhile."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server; `*` for all."""
    access_log: bool = False
    """Log every request."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(unknown_name("dtype", self.dtype, DTYPES))
        least = {"port": 0, "max_body_bytes": 1024, "max_connections": 1, "kv_memory_mib": 1, "num_threads": 1}
        for name, low in least.items():
            got = self.__dict__[name]
            if got is not None and got < low:
                raise ConfigError(f"{name}={got} must be at least {low}")
        for entry in self.lora:
            if not all(entry.partition("=")):
                raise ConfigError(f"lora={entry!r}; expected NAME=PATH, such as brief=adapters/brief")
        if self.port > 65535:
            raise ConfigError(f"port={self.port} must be at most 65535")
        if not self.body_timeout_s > 0:
            raise ConfigError(f"body_timeout_s={self.body_timeout_s} must be above 0")
        for name in ("drain_s", "reload_every_s"):
            if not self.__dict__[name] >= 0:
                raise ConfigError(f"{name}={self.__dict__[name]} must not be negative")
