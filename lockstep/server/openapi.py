"""The OpenAPI document: what FastAPI derives, plus the bodies that are read by hand and the policies that are served."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from lockstep.core.tree import tree_map
from lockstep.server import oip, schemas
from lockstep.server.gate import ACT_ROUTE, INFER_ROUTE, OPEN_PATHS
from lockstep.server.repository import Loaded, Repository
from lockstep.server.tensors import OBSERVATION

REF = "#/components/schemas/{model}"


def document_routes(app: FastAPI, repository: Repository, *, needs_key: bool) -> None:
    """Replace the application's `openapi` by one that is true of the policies loaded now."""

    def openapi() -> dict[str, Any]:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = document.setdefault("components", {}).setdefault("schemas", {})
        act_request = _add(components, schemas.ActRequest)
        _narrow(components[act_request], repository)
        act_examples = {name: {"value": _act_example(s.loaded)} for name, s in repository.policies.items()}
        infer_request = _add(components, schemas.InferRequest)
        _narrow_inputs(components["InferInput"], repository)
        infer_examples = {name: {"value": _infer_example(s.loaded)} for name, s in repository.policies.items()}
        for path, item in document["paths"].items():
            for operation in item.values():
                operation["responses"].pop("422", None)
                for parameter in operation.get("parameters", []):
                    if parameter["name"] == "name":
                        parameter["schema"] = {"type": "string", "enum": list(repository.policies)}
                if path == ACT_ROUTE:
                    operation["requestBody"] = _body(act_request, act_examples)
                elif path.endswith("/infer") and path.startswith(INFER_ROUTE.removesuffix("/infer")):
                    operation["requestBody"] = _body(infer_request, infer_examples)
                    operation["responses"]["200"]["content"]["application/octet-stream"] = {
                        "schema": {"type": "string", "format": "binary"}
                    }
                if needs_key and path not in OPEN_PATHS:
                    operation["security"] = [{"bearer": []}, {"key": []}]
        if needs_key:
            document["components"]["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _add(components: dict[str, Any], model: type[BaseModel]) -> str:
    schema = model.model_json_schema(ref_template=REF)
    components.update(schema.pop("$defs", {}))
    components[model.__name__] = schema
    return model.__name__


def _narrow(schema: dict[str, Any], repository: Repository) -> None:
    """Observations of the policies that are served, and that exactly one of the two fields is given."""
    interfaces = [served.loaded.interface for served in repository.policies.values()]
    for field, batched in (("observation", False), ("observations", True)):
        options: list[dict[str, Any]] = []
        for interface in interfaces:
            option = schemas.observation_schema(interface, batched=batched)
            if option not in options:
                options.append(option)
        schema["properties"][field] = options[0] if len(options) == 1 else {"anyOf": options}
    schema["oneOf"] = [{"required": ["observation"]}, {"required": ["observations"]}]


def _narrow_inputs(schema: dict[str, Any], repository: Repository) -> None:
    """Names and datatypes of the served policies' inputs."""
    specs = [spec for served in repository.policies.values() for spec in served.loaded.interface.inputs]
    schema["properties"]["name"] = {"type": "string", "enum": sorted({spec.name for spec in specs})}
    datatypes = {datatype for spec in specs for datatype in oip.accepted_datatypes(spec)}
    schema["properties"]["datatype"] = {"type": "string", "enum": sorted(datatypes)}


def _act_example(loaded: Loaded) -> dict[str, Any]:
    obs = loaded.interface.example(1)
    return {"observation": tree_map(lambda x: x[0].tolist(), obs)}


def _infer_example(loaded: Loaded) -> dict[str, Any]:
    obs = loaded.interface.example(1)
    arrays = obs if isinstance(obs, dict) else {OBSERVATION: obs}
    return {
        "inputs": [
            {
                "name": spec.name,
                "shape": [1, *spec.shape],
                "datatype": spec.datatype,
                "data": arrays[spec.name].ravel().tolist(),
            }
            for spec in loaded.interface.inputs
        ]
    }


def _body(model: str, examples: dict[str, Any]) -> dict[str, Any]:
    content = {"schema": {"$ref": REF.format(model=model)}, "examples": examples}
    return {"required": True, "content": {"application/json": content}}
