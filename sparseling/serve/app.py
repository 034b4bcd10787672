"""The routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from .. import __version__
from .chat_completions import Chat
from .completions import Completion
from .embeddings import embeddings
from .errors import ApiError, json_response
from .limits import Limits
from .protocol import ChatRequest, CompletionRequest, EmbeddingRequest
from .routing import expert_load
from .service import Service
from .streaming import EventStream, unless_disconnected

PAGE = Path(__file__).with_name("page")


def create_app(service: Service) -> Limits:
    """The whole ASGI app; its lifespan starts and stops the engine's thread."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.thread.start()
        yield
        service.thread.stop()

    app = FastAPI(title="sparseling", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    limits = Limits(app, service.settings, service.metrics)
    app.state.limits = limits
    add_completions(app, service)
    add_statistics(app, service, limits)
    add_errors(app)
    add_page(app)
    return limits


def add_completions(app: FastAPI, service: Service) -> None:
    """What computes."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await reply(request, Chat(service, body))

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await reply(request, Completion(service, body))

    @app.post("/v1/embeddings")
    async def embed(request: Request, body: EmbeddingRequest) -> Response:
        return json_response(await unless_disconnected(request, embeddings(service, body)))


async def reply(request: Request, work: Chat | Completion) -> Response:
    """As a stream or whole, as the request says."""
    await work.begin()
    if work.request.stream:
        return EventStream(work.chunks(), work.answers.close)
    try:
        return json_response(await unless_disconnected(request, work.whole()))
    finally:
        work.answers.close()


def add_statistics(app: FastAPI, service: Service, limits: Limits) -> None:
    """What only tells."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return service.model_card()

    @app.get("/v1/experts/load")
    async def experts_load() -> dict[str, Any]:
        return expert_load(service.thread.scheduler)

    @app.get("/health")
    async def health() -> Response:
        status = "draining" if limits.draining else "ok" if service.thread.thread.is_alive() else "failed"
        return json_response({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def add_errors(app: FastAPI) -> None:
    """Every error in the form of the OpenAI API."""

    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            why = first.get("ctx", {}).get("error", first["msg"])
            return ApiError(400, f"body: is no JSON ({why}); mend it", None, "invalid_value").response()
        if len(first["loc"]) == 1 and "json" not in request.headers.get("content-type", ""):
            return ApiError(400, "body: was not sent as JSON; add the header 'Content-Type: application/json'", None,
                            "invalid_value").response()
        place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        return ApiError(400, f"{place or 'body'}: {first['msg']}", place or None, "invalid_value").response()

    @app.exception_handler(HTTPException)
    async def http_error(_request: Request, error: HTTPException) -> Response:
        made = ApiError(error.status_code, str(error.detail)).response()
        made.headers.update(error.headers or {})
        return made

    @app.exception_handler(Exception)
    async def unexpected(_request: Request, error: Exception) -> Response:
        return ApiError(500, f"{type(error).__name__}: {error}").response()


def add_page(app: FastAPI) -> None:
    """The page, if it is there."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        if not (PAGE / "index.html").is_file():
            raise ApiError(404, "this installation has no page; the API is under /v1, its description at /openapi.json")
        return FileResponse(PAGE / "index.html")

    if PAGE.is_dir():
        app.mount("/page", StaticFiles(directory=PAGE), name="page")
