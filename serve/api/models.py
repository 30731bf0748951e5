"""``GET /v1/models`` and the names under which the model is served."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from serve.api.errors import ApiError, json_response
from serve.api.settings import API, Api


def check_model(name: str, api: Api) -> str:
    """Return the served name for ``name``, which may be empty; 404 if it is not served here."""
    names = api.settings.served_model_names
    if name == "":
        return names[0]
    if name not in names:
        raise ApiError(f"The model `{name[:200]}` does not exist.", status=404, param="model")
    return name


async def list_models(http: web.Request) -> web.Response:
    """Answer with every name under which the model is served."""
    api = http.app[API]
    cards = [_model_card(api, name) for name in api.settings.served_model_names]
    return json_response({"object": "list", "data": cards})


async def get_model(http: web.Request) -> web.Response:
    """Answer with one model. Its id may contain slashes."""
    api = http.app[API]
    return json_response(_model_card(api, check_model(http.match_info["id"], api)))


def _model_card(api: Api, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": api.settings.created,
        "owned_by": "serve",
        "root": api.settings.model_path,
        "parent": None,
        "max_model_len": api.service.max_model_len or None,
        "permission": [],
    }
