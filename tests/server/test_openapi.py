"""The OpenAPI document is true: schemathesis finds no 5xx and no reply that it does not describe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import SPECS, Server, serving

CHECKS = (
    "not_a_server_error",
    "response_schema_conformance",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
)


def test_document_names_policies_and_shapes(shared: Server) -> None:
    document = shared.call("GET", "/openapi.json").json()
    act = document["paths"]["/v1/policies/{name}/act"]["post"]
    assert act["parameters"][0]["schema"]["enum"] == list(SPECS)
    assert "422" not in act["responses"]
    request = document["components"]["schemas"]["ActRequest"]
    cart = request["properties"]["observation"]["anyOf"][0]
    assert cart == {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    parameters = {parameter["name"] for operation in operations for parameter in operation.get("parameters", [])}
    assert parameters == {"name", "version", "session_id"}


@pytest.mark.parametrize("kind", list(SPECS))
def test_examples_of_the_document_are_answered(shared: Server, kind: str) -> None:
    paths = shared.call("GET", "/openapi.json").json()["paths"]
    for path in ("/v1/policies/{name}/act", "/v2/models/{name}/infer"):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["examples"][kind]["value"]
        reply = shared.call("POST", path.replace("{name}", kind), json=body)
        assert reply.status_code == 200, json.dumps(body)


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(folders: dict[str, Path], tmp_path: Path) -> None:
    """Every operation but unload (which makes 503 right), with valid and invalid requests made from its schema."""
    pytest.importorskip("schemathesis")
    with serving([f"cart={folders['cart']}", f"masked={folders['masked']}"]) as address:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"http://{address}/openapi.json"]
        options = ["--max-examples=10", "--seed=1", "--exclude-path-regex=unload", "--no-color"]
        checks = [f"--checks={','.join(CHECKS)}", "--phases=examples,coverage,fuzzing"]
        done = subprocess.run([*command, *options, *checks], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "generated" in done.stdout
