"""What /v1/policies/{name}/act answers is what an Actor computes, bit for bit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from lockstep.models.control.actor import Actor

from .conftest import Server, make_policy

RNG = np.random.default_rng(0)


def observations(kind: str, num: int) -> Any:
    if kind == "masked":
        mask = RNG.random((num, 3)) < 0.6
        mask[:, 1] |= ~mask.any(axis=1)
        return {
            "position": RNG.integers(0, 5, num),
            "speed": RNG.standard_normal((num, 2)).astype(np.float32),
            "action_mask": mask,
        }
    size = {"walker": 5}.get(kind, 4)
    return RNG.standard_normal((num, size)).astype(np.float32)


def as_json(obs: Any) -> Any:
    return {key: value.tolist() for key, value in obs.items()} if isinstance(obs, dict) else obs.tolist()


def row(obs: Any, index: int) -> Any:
    return {key: value[index] for key, value in obs.items()} if isinstance(obs, dict) else obs[index]


@pytest.mark.parametrize("kind", ["cart", "walker", "memory", "masked", "twin"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_served_equals_actor(shared: Server, kind: str, deterministic: bool) -> None:
    obs = observations(kind, 6)
    body = {"observations": as_json(obs), "deterministic": deterministic, "seed": 11}
    reply = shared.act(kind, body).json()
    expected = Actor(make_policy(kind), 6, seed=11).act(obs, deterministic=deterministic)
    assert reply["action"] == expected.env_action.tolist()
    assert reply["logprob"] == expected.logprob.tolist()
    assert reply["value"] == (None if expected.value is None else expected.value.tolist())
    assert reply["version"] == "1"
    assert reply["digest"] == make_policy(kind).digest()


@pytest.mark.parametrize("kind", ["cart", "walker", "memory", "masked", "twin"])
def test_batched_requests_equal_single_ones(server: Server, kind: str) -> None:
    """Forty concurrent requests run in few batches, and each reply has the bits of the same request alone."""
    obs = observations(kind, 40)
    bodies = [
        {"observation": as_json(row(obs, i)), "deterministic": i % 3 == 0, "seed": i % 2, "session_id": f"s{i}"}
        for i in range(40)
    ]
    url = f"/v1/policies/{kind}/act"

    async def together(client: httpx.AsyncClient) -> list[Any]:
        replies = await asyncio.gather(*(client.post(url, json=body) for body in bodies))
        return [reply.json() for reply in replies]

    batched = server.run(together)
    stats = server.repository[kind].batcher.stats
    assert stats.num_rows == 40
    assert stats.num_batches < 20
    alone = [server.act(kind, {**body, "session_id": f"t{i}"}).json() for i, body in enumerate(bodies)]
    assert batched == alone


def test_a_session_equals_an_actor_run(shared: Server) -> None:
    """Recurrent state, frame stack and random stream of a session go on as an Actor's, resets included."""
    actor = Actor(make_policy("memory"), 1, seed=5)
    for step in range(12):
        obs = observations("memory", 1)
        starts = step in (0, 7)
        expected = actor.act(obs, deterministic=False)
        actor.advance(np.array([step + 1 in (0, 7)]))
        body = {"observation": obs[0].tolist(), "deterministic": False, "session_id": "a", "seed": 5, "reset": starts}
        reply = shared.act("memory", body).json()
        assert reply["action"] == expected.env_action[0].tolist(), step
        assert reply["logprob"] == float(expected.logprob[0]), step
        assert reply["value"] == float(expected.value[0]), step  # type: ignore[index]


def test_a_session_of_many_rows_resets_row_by_row(shared: Server) -> None:
    actor = Actor(make_policy("memory"), 3, seed=5)
    for step in range(5):
        obs = observations("memory", 3)
        expected = actor.act(obs, deterministic=False)
        ends = np.array([step == 1, step == 2, False])
        actor.advance(ends)
        reset = None if step == 0 else [step == 2, step == 3, False]
        body = {"observations": obs.tolist(), "deterministic": False, "session_id": "v", "seed": 5, "reset": reset}
        assert shared.act("memory", body).json()["logprob"] == expected.logprob.tolist(), step


def test_concurrent_requests_of_one_session_keep_their_order(shared: Server) -> None:
    obs = observations("memory", 8)
    actor = Actor(make_policy("memory"), 1, seed=5)
    expected = []
    for i in range(8):
        expected.append(actor.act(obs[i : i + 1], deterministic=False).logprob.item())
        actor.advance(np.array([False]))

    async def together(client: httpx.AsyncClient) -> list[float]:
        bodies = [{"observation": o.tolist(), "deterministic": False, "session_id": "q", "seed": 5} for o in obs]
        replies = await asyncio.gather(*(client.post("/v1/policies/memory/act", json=body) for body in bodies))
        return [reply.json()["logprob"] for reply in replies]

    assert shared.run(together) == expected


def test_sampling_without_a_seed_differs_from_request_to_request(shared: Server) -> None:
    body = {"observation": [0.1, 0.2, 0.3, 0.4, 0.5], "deterministic": False}
    actions = [shared.act("walker", body).json()["action"] for _ in range(5)]
    assert len({tuple(action) for action in actions}) == 5
    repeated = [shared.act("walker", {**body, "seed": 3}).json()["action"] for _ in range(2)]
    assert repeated[0] == repeated[1]


def test_threaded_batches_equal_inline_ones(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep.server.repository.INLINE_BELOW_S", 0.0)
    threaded = Server(folders)
    assert not threaded.repository["cart"].loaded.inline
    obs = observations("cart", 20)

    async def together(client: httpx.AsyncClient) -> list[Any]:
        bodies = [{"observation": o.tolist()} for o in obs]
        replies = await asyncio.gather(*(client.post("/v1/policies/cart/act", json=body) for body in bodies))
        return [reply.json()["logprob"] for reply in replies]

    expected = Actor(make_policy("cart"), 20, seed=0).act(obs, deterministic=True).logprob.tolist()
    assert threaded.run(together) == expected
    threaded.repository.close()


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        ("cart", {}, "observation"),
        ("cart", {"observation": [0, 0, 0, 0], "observations": [[0, 0, 0, 0]]}, "observation"),
        ("cart", {"observation": [0, 0, 0]}, "observation"),
        ("cart", {"observation": [[0, 0, 0, 0]]}, "observation"),
        ("cart", {"observation": [0, 0, 0, "1"]}, "observation"),
        ("cart", {"observation": [0, 0, 0, None]}, "observation"),
        ("cart", {"observation": [0, 0, 0, True]}, "observation"),
        ("cart", {"observation": [0, 0, 0, [1]]}, "observation"),
        ("cart", {"observation": [0, 0, 0, 1e300]}, "observation"),
        ("cart", {"observation": [0, 0, 0, 10**400]}, "observation"),
        ("cart", {"observation": [0, 0, 0, 10**30]}, "observation"),
        ("cart", {"observation": "zero"}, "observation"),
        ("cart", {"observation": {"a": 1}}, "observation"),
        ("cart", {"observations": []}, "observations"),
        ("cart", {"observations": [[0, 0, 0, 0], [0, 0, 0]]}, "observations"),
        ("cart", {"observation": [0, 0, 0, 0], "deterministic": 1}, "deterministic"),
        ("cart", {"observation": [0, 0, 0, 0], "seed": -1}, "seed"),
        ("cart", {"observation": [0, 0, 0, 0], "seed": 2**63}, "seed"),
        ("cart", {"observation": [0, 0, 0, 0], "seed": True}, "seed"),
        ("cart", {"observation": [0, 0, 0, 0], "session_id": ""}, "session_id"),
        ("cart", {"observation": [0, 0, 0, 0], "session_id": 3}, "session_id"),
        ("cart", {"observation": [0, 0, 0, 0], "reset": True}, "reset"),
        ("cart", {"observation": [0, 0, 0, 0], "reset": 3, "session_id": "a"}, "reset"),
        ("cart", {"observation": [0, 0, 0, 0], "sesion_id": "a"}, "sesion_id"),
        ("masked", {"observation": [0, 0, 0, 0]}, "observation"),
        ("masked", {"observation": {"position": 0, "speed": [0, 0]}}, "action_mask"),
        ("masked", {"observation": {"position": 5, "speed": [0, 0], "action_mask": [1, 1, 1]}}, "position"),
        ("masked", {"observation": {"position": 0.5, "speed": [0, 0], "action_mask": [1, 1, 1]}}, "position"),
        ("masked", {"observation": {"position": 0, "speed": [0], "action_mask": [1, 1, 1]}}, "speed"),
        ("masked", {"observation": {"position": 0, "speed": [0, 0], "action_mask": [0, 0, 0]}}, "action_mask"),
        ("masked", {"observation": {"position": 0, "speed": [0, 0], "action_mask": [2, 0, 0]}}, "action_mask"),
        ("masked", {"observations": {"position": [0], "speed": [[0, 0]] * 2, "action_mask": [[1, 1, 1]]}}, "speed"),
    ],
)
def test_bad_input_names_its_field(shared: Server, kind: str, body: Any, field: str) -> None:
    reply = shared.act(kind, body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["field"] == field
    assert reply.json()["error"]


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity"])
def test_non_finite_numbers_name_the_observation(shared: Server, token: str) -> None:
    text = f'{{"observation": [0, 0, {token}, 0]}}'
    reply = shared.call("POST", "/v1/policies/cart/act", content=text, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["field"] == "observation"


def test_values_that_overflow_the_policy_are_refused_and_leave_the_session_alone(server: Server) -> None:
    good = {"observation": [0.1, 0.2, 0.3, 0.4], "session_id": "o", "seed": 1}
    first = server.act("memory", good).json()
    huge = server.act("memory", {**good, "observation": [3e38, -3e38, 3e38, 3e38]})
    session = server.repository["memory"].sessions.take("o", 1, None, 0, lambda _: 0)
    assert all(bool(torch.isfinite(x).all()) for x in session.state.values())
    if huge.status_code == 400:
        assert huge.json()["field"] == "observation"
        assert session.position == 1
    assert first["value"] is not None


def test_a_session_keeps_its_rows_and_seed(shared: Server) -> None:
    shared.act("cart", {"observation": [0, 0, 0, 0], "session_id": "k", "seed": 1})
    other_rows = shared.act("cart", {"observations": [[0, 0, 0, 0]] * 2, "session_id": "k"})
    other_seed = shared.act("cart", {"observation": [0, 0, 0, 0], "session_id": "k", "seed": 2})
    assert (other_rows.status_code, other_rows.json()["field"]) == (400, "session_id")
    assert (other_seed.status_code, other_seed.json()["field"]) == (400, "seed")
    assert shared.call("DELETE", "/v1/policies/cart/sessions/k").status_code == 204
    assert shared.call("DELETE", "/v1/policies/cart/sessions/k").status_code == 404
    assert shared.act("cart", {"observation": [0, 0, 0, 0], "session_id": "k", "seed": 2}).status_code == 200
