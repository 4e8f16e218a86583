"""Policy folders in the shape of the Hugging Face hub: `config.json`, `model.safetensors`, `README.md`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lockstep.core.errors import CheckpointError, ConfigError, FormatError
from lockstep.models.control.policy import Policy, num_parameters
from lockstep.models.control.spec import PolicySpec
from lockstep.models.graph.folder import load_original, save_original

FORMAT = "lockstep-policy-1"


def save_policy(
    policy: Policy,
    folder: Path,
    *,
    results: dict[str, Any] | None = None,
    title: str = "",
    environment: dict[str, Any] | None = None,
) -> None:
    """Write a policy folder. Files are replaced one by one through a rename, the weights last.

    Args:
        environment: what it was trained on, in JSON values, so that the folder can be evaluated on its own.
        results: figures for the card, e.g. environment, mean return, interval, episodes, recipe.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "version": policy.version, "digest": policy.digest(), "spec": policy.spec.to_json()}
    if environment is not None:
        config["environment"] = environment
    _replace(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if policy.imported is not None:
        save_original(policy.imported, folder)
    _replace(folder / "README.md", model_card(policy, results or {}, title or folder.name))
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in policy.state_dict().items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")


def load_policy(folder: Path) -> Policy:
    """Read a policy folder, or the `policy/` folder of a run directory.

    Raises:
        CheckpointError: a file is missing, malformed, or weights, config and digest do not belong together.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() or not (folder / "model.safetensors").exists():
        if (folder / "policy" / "config.json").exists():
            return load_policy(folder / "policy")
        raise CheckpointError(
            f"{folder} is not a policy folder: it lacks config.json or model.safetensors; "
            "give a folder written by training (RUN/policy, from a run's first checkpoint on) or by save_policy"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
        if config.get("format") != FORMAT:
            raise CheckpointError(f"{folder}/config.json has format {config.get('format')!r}; expected {FORMAT!r}")
        policy = Policy(PolicySpec.from_json(config["spec"]))
        tensors = load_file(folder / "model.safetensors")
    except (
        OSError,
        json.JSONDecodeError,
        KeyError,
        AttributeError,
        TypeError,
        SafetensorError,
        ConfigError,
        FormatError,
    ) as error:
        raise CheckpointError(f"{folder} cannot be read: {error!r}") from error
    expected = policy.state_dict()
    wrong = sorted(set(expected) ^ set(tensors))
    wrong += [n for n in expected if n in tensors and tensors[n].shape != expected[n].shape]
    if wrong:
        raise CheckpointError(f"{folder}/model.safetensors does not match config.json at {wrong[:5]}")
    policy.load_state_dict(tensors)
    if policy.imported is not None:
        policy.imported.original = load_original(folder)
    policy.version = int(config["version"])
    if policy.digest() != config["digest"]:
        raise CheckpointError(
            f"{folder}: the weights' digest is {policy.digest()[:12]}, config.json says {config['digest'][:12]}; "
            "the folder mixes two versions or is damaged"
        )
    return policy.eval()


def model_card(policy: Policy, results: dict[str, Any], title: str) -> str:
    """The folder's README.md, with the metadata block that hubs read."""
    spec = policy.spec
    lines = [
        "---",
        "library_name: lockstep",
        "tags: [reinforcement-learning, lockstep]",
        "---",
        f"# {title}",
        "",
        f"A control policy of {num_parameters(policy):,} parameters, version {policy.version}. Normalisation, frame stacking "
        "and action scaling are part of it.",
        "",
        f"- observation: `{spec.obs_space}`",
        f"- action: `{spec.action_space}`",
        f"- head: {spec.head}; network: {spec.network.hidden_sizes}, {spec.network.activation}, "
        f"recurrent: {spec.network.recurrent}",
        "",
    ]
    if results:
        lines += ["| result | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in results.items()), ""]
    lines += ["```python", "from lockstep import load", "", "action = load(FOLDER).predict(observation)", "```", ""]
    return "\n".join(lines)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
