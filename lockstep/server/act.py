"""`POST /v1/policies/{name}/act`: one JSON object in, one out."""

from __future__ import annotations

from typing import Any

import numpy as np

from lockstep.core.errors import InputError, unknown_name
from lockstep.server.decide import Wish, decide, read_flag, read_seed, read_session_id, ready_policy
from lockstep.server.limits import Headers, check_media, decoded, parse_json
from lockstep.server.replies import Reply, json_reply, shortened
from lockstep.server.repository import Repository

FIELDS = frozenset({"observation", "observations", "deterministic", "seed", "session_id", "reset"})
MEDIA = (b"application/json",)


async def act(repository: Repository, name: str, body: bytes, headers: Headers) -> Reply:
    """Answer one request; the body is as sent.

    Raises:
        InputError: naming the field that is wrong.
        Refusal: with its status.
    """
    served = ready_policy(repository, name)
    check_media(headers, MEDIA)
    document = parse_json(decoded(body, headers, served.config.max_body_bytes))
    if not document.keys() <= FIELDS:
        wrong = next(key for key in document if key not in FIELDS)
        raise InputError(unknown_name("field", shortened(wrong), FIELDS), field=shortened(wrong))
    single = "observation" in document
    if single == ("observations" in document):
        raise InputError(
            "observation: give either `observation` (one) or `observations` (with a leading axis of rows)",
            field="observation",
        )
    loaded = served.loaded
    try:
        value = document["observation" if single else "observations"]
        obs, num_rows = loaded.interface.observation_from_json(value, batched=not single)
    except InputError as error:
        if not single and error.field == "observation":
            error.field = "observations"
        raise
    wish = Wish()
    if len(document) > 1:
        wish = Wish(
            deterministic=read_flag(document, "deterministic", True),
            seed=read_seed(document),
            session_id=read_session_id(document),
            reset=read_reset(document, num_rows, single=single),
        )
    decision = await decide(repository, served, loaded, obs, num_rows, wish)
    action, logprob, value = decision.action, decision.logprob, decision.value
    if single:
        action, logprob, value = action[0], logprob[0], None if value is None else value[0]
    reply: dict[str, Any] = {
        "action": action.tolist(),
        "logprob": logprob.tolist(),
        "value": None if value is None else value.tolist(),
        "version": loaded.version,
        "digest": loaded.digest,
    }
    return json_reply(reply)


def read_reset(document: dict[str, Any], num_rows: int, *, single: bool) -> np.ndarray | None:
    """Which rows begin an episode: true for all, or one flag for each row of `observations`.

    Raises:
        InputError: another form, or flags without a session.
    """
    value = document.get("reset")
    if value is None or value is False:
        return None
    if document.get("session_id") is None:
        raise InputError("reset: needs a session_id; without one every request begins an episode", field="reset")
    if value is True:
        return np.ones(num_rows, np.bool_)
    if not single and isinstance(value, list) and set(map(type, value)) == {bool} and len(value) == num_rows:
        return np.array(value)
    expected = "true or false" if single else f"true, false or {num_rows} of them"
    raise InputError(f"reset: expected {expected}", field="reset")
