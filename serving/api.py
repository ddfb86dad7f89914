"""The routes of /v1: what an image shows, its embedding, where the model looks; and the models themselves."""

import asyncio
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic.json_schema import SkipJsonSchema

from serving.classes import Classes, Prompts
from serving.images import overlay
from serving.models import Model, softmax
from serving.problems import Problem, responses
from serving.registry import Entry
from serving.requests import (
    LONGEST_MS,
    HowAsked,
    Timeout,
    Upload,
    WhichModel,
    deadline_of,
    free_classes,
    read_uploads,
    while_wanted,
)
from serving.schemas import (
    ActivateRequest,
    Answer,
    BatchItem,
    BatchPrediction,
    ClassesRequest,
    Embedding,
    Explanation,
    LoadRequest,
    Models,
    ModelStatus,
    Prediction,
    to_scored,
)
from serving.service import Service
from serving.settings import NAME

router = APIRouter(prefix="/v1")
ModelName = Annotated[str, Path(pattern=NAME, examples=["har"])]

ALWAYS = ("unauthorized", "forbidden", "host_not_allowed", "too_many_requests", "internal", "not_ready")
BODY = ("malformed", "invalid_request", "body_timeout", "body_too_large", "unknown_model")
COMPUTED = ("empty_body", "bad_image", "unsupported_media_type", "bad_model_output", "overloaded", "deadline")
IMAGE_ERRORS = responses(*ALWAYS, *BODY, *COMPUTED, "not_found", "classes_not_supported")
MODEL_ERRORS = responses(
    *ALWAYS, *BODY, "not_found", "conflict", "load_failed", "classes_not_supported", "overloaded", "deadline"
)


CLASSES_FIELD = {
    "type": "string",
    "description": 'JSON: ["NAME", ...] or {"NAME": ["PROMPT", ...]}',
    "examples": ['["riding a bike", "sleeping"]'],
}


def image_body(field: dict[str, Any], raw: bool = True, classes: bool = True) -> dict[str, Any]:
    """What OpenAPI says of a body that FastAPI doesn't read itself."""
    properties: dict[str, Any] = {"image": field}
    if classes:
        properties["classes"] = CLASSES_FIELD
    form = {"type": "object", "properties": properties, "required": ["image"], "additionalProperties": False}
    content: dict[str, Any] = {"multipart/form-data": {"schema": form}}
    if raw:
        binary = {"schema": {"type": "string", "format": "binary"}}
        content |= dict.fromkeys(("image/jpeg", "image/png", "image/webp"), binary)
    return {"requestBody": {"required": True, "content": content}}


BINARY = {"type": "string", "format": "binary", "description": "a JPEG, PNG or WebP file"}
ONE_IMAGE, ONE_IMAGE_ALONE = image_body(BINARY), image_body(BINARY, classes=False)
MANY_IMAGES = image_body({"type": "array", "items": BINARY, "minItems": 1}, raw=False)


def service_of(request: Request) -> Service:
    """Return the service that a request came to."""
    return request.app.state.service


async def _one_image(request: Request, service: Service) -> tuple[Upload, str | None]:
    (upload,), classes = await read_uploads(request, "image", 1)
    return upload, classes


async def _classes(
    service: Service, model: Model, prompts: dict[str, Prompts] | None, deadline: float
) -> Classes | None:
    """What an embedding is compared with; None: the classifier's own classes."""
    if prompts is None:
        return model.classes
    if not model.accepts_classes:
        raise model.refusal()
    return await model.open_vocabulary(prompts, service.batcher, deadline)


async def _probs(
    service: Service, model: Model, classes: Classes | None, pixels: np.ndarray, deadline: float
) -> np.ndarray:
    """Class probabilities of one decoded image."""
    if classes is None:
        return softmax(await service.batcher.run(model.classify, pixels, deadline))
    return softmax(classes.logits(await service.batcher.run(model.embed, pixels, deadline)))


def _answer(service: Service, model: Model, labels: tuple[str, ...], probs: np.ndarray, asked: HowAsked) -> Answer:
    top = to_scored(labels, probs, asked.top)
    own = labels == model.labels
    threshold = asked.threshold if asked.threshold is not None else (model.abstain_below if own else None)
    abstained = threshold is not None and top[0].score < threshold
    service.metrics.predictions.labels(model.name, top[0].label if own else "(free text)").inc()
    if abstained:
        service.metrics.abstentions.labels(model.name).inc()
    return Answer(label=None if abstained else top[0].label, score=top[0].score, top=top, abstained=abstained)


@router.post("/predict", responses=IMAGE_ERRORS, openapi_extra=ONE_IMAGE)
async def predict(request: Request, which: WhichModel, asked: HowAsked, timeout_ms: Timeout = LONGEST_MS) -> Prediction:
    """What the image shows: the most probable actions, of the model's own classes or of `classes` in free text."""
    service = service_of(request)
    deadline = deadline_of(service.settings, timeout_ms)
    model = service.begin(request, which)
    upload, field = await _one_image(request, service)
    prompts = free_classes(list(asked.classes), field, service.settings)

    async def work() -> Prediction:
        classes = await _classes(service, model, prompts, deadline)
        async with service.batcher.admit(model.embed if classes else model.classify):
            pixels = await service.decode(upload.data, model, deadline)
            probs = await _probs(service, model, classes, pixels, deadline)
        answer = _answer(service, model, classes.labels if classes else model.labels, probs, asked)
        return Prediction(**dict(answer), model=model.ref)

    return await while_wanted(request, work())


@router.post("/predict/batch", responses=IMAGE_ERRORS, openapi_extra=MANY_IMAGES, response_model_exclude_none=False)
async def predict_batch(
    request: Request, which: WhichModel, asked: HowAsked, timeout_ms: Timeout = LONGEST_MS
) -> BatchPrediction:
    """As /v1/predict for several images, the form's field `image` repeated; one that can't be read has an error."""
    service = service_of(request)
    deadline = deadline_of(service.settings, timeout_ms)
    model = service.begin(request, which)
    uploads, field = await read_uploads(request, "image", service.settings.max_batch_images)
    prompts = free_classes(list(asked.classes), field, service.settings)
    service.limiter.take(request.state.client, len(uploads) - 1)

    async def one(upload: Upload, classes: Classes | None) -> BatchItem:
        try:
            pixels = await service.decode(upload.data, model, deadline)
            probs = await _probs(service, model, classes, pixels, deadline)
        except Problem as problem:
            return BatchItem(filename=upload.filename, error=problem.to_body(request.state.request_id))
        answer = _answer(service, model, classes.labels if classes else model.labels, probs, asked)
        return BatchItem(filename=upload.filename, **dict(answer))

    async def work() -> BatchPrediction:
        classes = await _classes(service, model, prompts, deadline)
        async with service.batcher.admit(model.embed if classes else model.classify, len(uploads)):
            items = await asyncio.gather(*(one(upload, classes) for upload in uploads))
        return BatchPrediction(predictions=items, model=model.ref)

    return await while_wanted(request, work())


@router.post("/embed", responses=IMAGE_ERRORS, openapi_extra=ONE_IMAGE_ALONE)
async def embed(request: Request, which: WhichModel, timeout_ms: Timeout = LONGEST_MS) -> Embedding:
    """Return the image's embedding, to compare images or to search among them."""
    service = service_of(request)
    deadline = deadline_of(service.settings, timeout_ms)
    model = service.begin(request, which)
    upload, _ = await _one_image(request, service)

    async def work() -> Embedding:
        async with service.batcher.admit(model.embed):
            pixels = await service.decode(upload.data, model, deadline)
            embedding = await service.batcher.run(model.embed, pixels, deadline)
        return Embedding(embedding=embedding.tolist(), model=model.ref)

    return await while_wanted(request, work())


@router.post(
    "/explain",
    responses=IMAGE_ERRORS | {200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}},
    openapi_extra=ONE_IMAGE,
    response_model=Explanation,
)
async def explain(
    request: Request,
    which: WhichModel,
    asked: HowAsked,
    label: Annotated[
        str | SkipJsonSchema[None], Query(max_length=200, description="left out: the most probable class")
    ] = None,
    timeout_ms: Timeout = LONGEST_MS,
) -> Explanation | Response:
    """Where the model sees a class in the image; as a picture with `Accept: image/png`."""
    service = service_of(request)
    deadline = deadline_of(service.settings, timeout_ms)
    model = service.begin(request, which)
    upload, field = await _one_image(request, service)
    prompts = free_classes(list(asked.classes), field, service.settings)

    async def work() -> tuple[Explanation, np.ndarray]:
        classes = await _classes(service, model, prompts, deadline)
        labels = classes.labels if classes else model.labels
        if label is not None and label not in labels:
            raise Problem("not_found", f"label: {label!r} is no class; classes: {', '.join(labels)[:500]}")
        lane = model.explain_text if classes else model.explain
        async with service.batcher.admit(lane, 2):
            pixels = await service.decode(upload.data, model, deadline)
            probs = await _probs(service, model, classes, pixels, deadline)
            index = int(np.argmax(probs)) if label is None else labels.index(label)
            direction = classes.embeddings[index] if classes else index
            heat = await service.batcher.run(lane, (pixels, direction), deadline)
        found = Explanation(
            label=labels[index], score=float(probs[index]), heat_map=np.clip(heat, 0, 1).tolist(), model=model.ref
        )
        return found, pixels

    explanation, pixels = await while_wanted(request, work())
    if "image/png" not in request.headers.get("accept", ""):
        return explanation
    picture = await asyncio.to_thread(overlay, pixels, np.asarray(explanation.heat_map, np.float32))
    return Response(picture, media_type="image/png")


@router.get("/models", responses=responses(*ALWAYS))
async def list_models(request: Request) -> Models:
    """Return the models, and which of their versions answer."""
    return Models(models=[entry.status() for entry in service_of(request).registry.entries.values()])


@router.post("/models/{name}/load", responses=MODEL_ERRORS)
async def load_model(request: Request, name: ModelName, given: LoadRequest) -> ModelStatus:
    """Load a version: verified, warmed and proven aside, then switched to; if anything fails the old one stays."""
    registry = _only_process(request).registry
    registry.entry(name)
    path = registry.folder(given.folder) if given.folder is not None else None
    return _status(await registry.load(name, path, given.activate))


@router.post("/models/{name}/activate", responses=MODEL_ERRORS)
async def activate_model(request: Request, name: ModelName, given: ActivateRequest) -> ModelStatus:
    """Switches to a version that is loaded."""
    return _status(await _only_process(request).registry.activate(name, given.version))


@router.post("/models/{name}/classes", responses=MODEL_ERRORS)
async def change_classes(request: Request, name: ModelName, given: ClassesRequest) -> ModelStatus:
    """Add and remove classes by text; makes a version of its own and switches to it.

    With a state_dir the change outlasts loads and restarts of the same model; `reset` takes all changes back.
    """
    service = _only_process(request)
    deadline = deadline_of(service.settings)
    return _status(await service.registry.change_classes(name, given.add, given.remove, given.reset, deadline))


@router.delete("/models/{name}/versions/{version}", status_code=204, responses=MODEL_ERRORS)
async def unload_version(
    request: Request, name: ModelName, version: Annotated[str, Path(max_length=100, examples=["3f2a9c01b7de"])]
) -> None:
    """Drop a version that isn't active."""
    await _only_process(request).registry.unload(name, version)


def _only_process(request: Request) -> Service:
    """Return the service, where it is the only one: of several workers a request would change one."""
    service = service_of(request)
    if service.settings.workers > 1:
        raise Problem("conflict", "there are several workers: change the model's folder and send SIGHUP")
    return service


def _status(entry: Entry) -> ModelStatus:
    return entry.status()
