"""What the operator of a policy server chooses."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Limits and times of a policy server.

    >>> ServeConfig(max_batch=32).max_batch
    32
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """TCP port; 0 takes a free one and prints it."""
    max_batch: int = 256
    """Most rows that one call of the policy gets, in rows. A larger request runs alone."""
    max_wait_us: int = 0
    """How long an incomplete batch waits for more requests, in microseconds; 0 takes what is queued."""
    max_queue: int = 4096
    """Requests that may wait per policy; beyond it a request is answered 429."""
    max_body_bytes: int = 16 * 2**20
    """Largest request body, in bytes, compressed or not; beyond it a request is answered 413."""
    max_connections: int = 4096
    """Open connections and running requests; beyond it a request is answered 503."""
    request_timeout_s: float = 10.0
    """Deadline of one request, in seconds, from its first byte to its reply."""
    drain_s: float = 20.0
    """After SIGTERM, time for requests in flight to finish, in seconds."""
    reload_every_s: float = 2.0
    """How often the folders are looked at for a newer policy, in seconds; 0 only on request."""
    session_ttl_s: float = 3600.0
    """A session unused for so long is forgotten, in seconds."""
    max_sessions: int = 10_000
    """Sessions kept per policy; the one longest unused makes room for a new one."""
    seed: int | None = None
    """Of the sampling noise of requests that give none; None draws one at start."""
    num_threads: int = 1
    """Threads of one policy call. Small policies are slower with more."""
    access_log: bool = False
    """Log every request."""

    def __post_init__(self) -> None:
        least = {"max_batch": 1, "max_queue": 1, "max_body_bytes": 1024, "max_connections": 1, "max_sessions": 1}
        least |= {"num_threads": 1, "port": 0, "max_wait_us": 0}
        for name, low in least.items():
            if self.__dict__[name] < low:
                raise ConfigError(f"{name}={self.__dict__[name]} must be at least {low}")
        for name in ("request_timeout_s", "session_ttl_s"):
            if not self.__dict__[name] > 0:
                raise ConfigError(f"{name}={self.__dict__[name]} must be above 0")
        for name in ("drain_s", "reload_every_s"):
            if not self.__dict__[name] >= 0:
                raise ConfigError(f"{name}={self.__dict__[name]} must not be negative")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must lie in 0..2**63-1")
        if self.port > 65535:
            raise ConfigError(f"port={self.port} must be at most 65535")
