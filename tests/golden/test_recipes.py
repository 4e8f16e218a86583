"""Every recipe's resolved config is a file here, so that a changed default shows in a diff.

To accept a change: `python -m tests.golden.test_recipes`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.recipes import RECIPES
from lockstep.runs.config_json import config_from_json, config_to_json

FOLDER = Path(__file__).parent / "recipes"


def _text(name: str) -> str:
    return json.dumps(config_to_json(RECIPES[name]()), indent=1) + "\n"


@pytest.mark.parametrize("name", RECIPES)
def test_resolved_config_is_the_recorded_one(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == _text(name)


@pytest.mark.parametrize("name", RECIPES)
def test_config_survives_json(name: str) -> None:
    config = RECIPES[name]()
    assert config_from_json(type(config), json.loads(_text(name))) == config


def test_no_stale_records() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(RECIPES)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for stale in FOLDER.glob("*.json"):
        stale.unlink()
    for recipe_name in RECIPES:
        (FOLDER / f"{recipe_name}.json").write_text(_text(recipe_name))
