"""What a request must be for this engine to be able to finish it."""

from __future__ import annotations

from lockstep.core.batch import PAGE
from lockstep.core.errors import InputError
from lockstep.core.request import Request
from lockstep.engine.config import EnginePlan
from lockstep.engine.shaping import check_tokens


def check_request(
    request: Request, plan: EnginePlan, vocab_size: int, model_context: int, *, has_tokenizer: bool
) -> int:
    """The most tokens that a sample of the request may have.

    Raises:
        InputError: it could never be served; `field` names the part, the message has the numbers.
    """
    params, num_prompt = request.params, len(request.prompt)
    if num_prompt == 0:
        raise InputError("the prompt has no tokens; expected at least one", field="prompt")
    for token in (min(request.prompt), max(request.prompt)):
        if not 0 <= token < vocab_size:
            raise InputError(f"the prompt has token {token}; expected 0 <= id < {vocab_size}", field="prompt")
    if request.adapter:
        raise InputError(f"adapter {request.adapter!r} is not loaded; leave it empty", field="adapter")
    if params.stop and not has_tokenizer:
        raise InputError("stop strings need a tokenizer; this engine serves ids: use stop_token_ids", field="stop")
    if params.grammar is not None:
        raise InputError("this engine has no grammars; leave it out", field="grammar")
    most = plan.max_context - num_prompt
    if most < 1 or (params.max_tokens or 0) > most:
        raise InputError(
            f"a prompt of {num_prompt} tokens and max_tokens={params.max_tokens}; prompt and text together have "
            f"{plan.max_context} tokens at most (model {model_context}, cache {plan.num_pages} pages of {PAGE}): "
            "shorten either",
            field="max_tokens" if most >= 1 else "prompt",
        )
    if max(params.num_logprobs, params.prompt_logprobs or 0) > vocab_size:
        raise InputError(f"more alternatives wanted than the {vocab_size} tokens there are", field="num_logprobs")
    if params.n > plan.max_queue:
        raise InputError(f"n={params.n} samples; the queue holds max_queue={plan.max_queue}", field="n")
    check_tokens(params, vocab_size, plan.eos_token_ids)
    return params.max_tokens or most
