"""The routes of /v1: predictions, embeddings and explanations of images, and the management of models."""

import asyncio
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic.json_schema import SkipJsonSchema

from clip_har_jax.image_formats import format_titles, readable_formats, sniff
from clip_har_jax.inference.backends import ClassScores, above_thresholds
from clip_har_jax.video.decoding import is_video
from serving.calls import Call, QueryCall, deadline_after, service_of
from serving.classes import Prompts, TextClasses
from serving.clips import answer_clip
from serving.images import draw_heat_map
from serving.loaded_models import Entry
from serving.problems import Problem, responses
from serving.requests import AnswerQuery, Upload
from serving.schemas import (
    ActivateRequest,
    Answer,
    BatchItem,
    BatchPrediction,
    ClassesRequest,
    Embedding,
    Explanation,
    ImageKind,
    Limits,
    LoadRequest,
    Models,
    ModelStatus,
    PredictionBody,
    Scored,
    to_scored,
)
from serving.service import Service
from serving.settings import NAME, Settings

router = APIRouter(prefix="/v1")
ModelName = Annotated[str, Path(pattern=NAME, examples=["har"])]

ALWAYS = ("unauthorized", "forbidden", "host_not_allowed", "too_many_requests", "internal", "not_ready")
BODY = ("malformed", "invalid_request", "body_timeout", "body_too_large", "unknown_model")
COMPUTED = ("empty_body", "bad_image", "unsupported_media_type", "bad_model_output", "overloaded", "deadline")
CLIP_ERRORS = responses(*ALWAYS, *BODY, *COMPUTED, "not_found", "classes_not_supported", "bad_video")
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
    """Return the OpenAPI description of a body that FastAPI doesn't parse itself."""
    properties: dict[str, Any] = {"image": field}
    if classes:
        properties["classes"] = CLASSES_FIELD
    form = {"type": "object", "properties": properties, "required": ["image"], "additionalProperties": False}
    content: dict[str, Any] = {"multipart/form-data": {"schema": form}}
    if raw:
        binary = {"schema": {"type": "string", "format": "binary"}}
        content |= {one.media_type: binary for one in readable_formats()}
    return {"requestBody": {"required": True, "content": content}}


BINARY = {"type": "string", "format": "binary", "description": f"a file: {format_titles()}"}
ONE_IMAGE, ONE_IMAGE_ALONE = image_body(BINARY), image_body(BINARY, classes=False)
CLIP = f"{BINARY['description']}, or a clip: MP4, WebM, AVI, MKV, MOV ..."
IMAGE_OR_CLIP = image_body(BINARY | {"description": CLIP})
IMAGE_OR_CLIP["requestBody"]["content"]["video/mp4"] = {"schema": {"type": "string", "format": "binary"}}
MANY_IMAGES = image_body({"type": "array", "items": BINARY, "minItems": 1}, raw=False)


async def choose_classes(call: Call, prompts: dict[str, Prompts] | None) -> TextClasses | None:
    """Return the classes to compare an embedding with; None: the classifier's own."""
    if prompts is None:
        return call.model.classes
    if not call.model.accepts_classes:
        raise call.model.refusal()
    return await call.model.open_vocabulary(prompts, call.service.batcher, call.deadline)


async def _scores(call: Call, classes: TextClasses | None, pixels: np.ndarray) -> ClassScores:
    """Return the scores of one decoded image."""
    batcher, model = call.service.batcher, call.model
    if classes is None:
        logits = await batcher.run(model.classify, pixels, call.deadline)
    else:
        logits = classes.logits(await batcher.run(model.embed, pixels, call.deadline))
    return model.score(classes, logits[None])


def make_answer(call: Call, classes: TextClasses | None, scores: ClassScores, options: AnswerQuery) -> Answer:
    """Return the answer of the scores, and count it."""
    model, metrics = call.model, call.service.metrics
    labels = classes.labels if classes else model.labels
    top = to_scored(labels, scores.probs, options.top, scores.sigmoid)
    own = labels == model.labels
    threshold = options.threshold if options.threshold is not None else (model.abstain_below if own else None)
    best, several, abstained = top[0], {}, threshold is not None and top[0].score < threshold
    if model.actions.multi_label:
        found = above_thresholds(scores.probs, model.actions, options.threshold)
        several["labels"] = [Scored(label=label, score=score) for label, score in found]
        best, abstained = (several["labels"] or top)[0], not found
    metrics.predictions.labels(model.name, best.label if own else "(free text)").inc()
    if abstained:
        metrics.abstentions.labels(model.name).inc()
    return Answer(label=None if abstained else best.label, score=best.score, top=top, abstained=abstained, **several)


@router.post("/predict", responses=CLIP_ERRORS, openapi_extra=IMAGE_OR_CLIP, response_model_exclude_unset=True)
async def predict(call: QueryCall, options: AnswerQuery) -> PredictionBody:
    """Return the most probable actions in the image or clip, among the model's classes or `classes` in free text.

    From a clip, as many frames are sampled as in training; `/v1/videos` also returns the times of actions.
    """
    upload, field = await call.read_image(also="video")
    prompts = call.free_classes(options.classes, field)
    service, model, deadline = call.service, call.model, call.deadline

    async def work() -> PredictionBody:
        classes = await choose_classes(call, prompts)
        async with service.batcher.admit(model.embed if classes else model.classify):
            pixels = await service.decode(upload.data, model, deadline)
            scores = await _scores(call, classes, pixels)
        return PredictionBody(**dict(make_answer(call, classes, scores, options)), model=model.ref)

    async def work_on_clip() -> PredictionBody:
        classes = await choose_classes(call, prompts)
        async with service.one_video():
            scores, damage = await answer_clip(service, model, classes, upload.data, deadline)
        told = {"damage": damage} if damage else {}
        return PredictionBody(**dict(make_answer(call, classes, scores, options)), model=model.ref, **told)

    is_clip = sniff(upload.data) is None and is_video(upload.data)
    return await call.answer(work_on_clip() if is_clip else work())


@router.post("/predict/batch", responses=IMAGE_ERRORS, openapi_extra=MANY_IMAGES, response_model_exclude_none=False)
async def predict_batch(call: QueryCall, options: AnswerQuery) -> BatchPrediction:
    """Predict several images, sent as repeated fields `image`; each unreadable image has its own error."""
    service, model, deadline = call.service, call.model, call.deadline
    uploads, field = await call.read_uploads(service.settings.max_batch_images)
    prompts = call.free_classes(options.classes, field)

    async def one(upload: Upload, classes: TextClasses | None) -> BatchItem:
        try:
            pixels = await service.decode(upload.data, model, deadline)
            scores = await _scores(call, classes, pixels)
        except Problem as problem:
            return BatchItem(filename=upload.filename, error=problem.to_body(call.request.state.request_id))
        return BatchItem(filename=upload.filename, **dict(make_answer(call, classes, scores, options)))

    async def work() -> BatchPrediction:
        classes = await choose_classes(call, prompts)
        async with service.batcher.admit(model.embed if classes else model.classify, len(uploads)):
            items = await asyncio.gather(*(one(upload, classes) for upload in uploads))
        return BatchPrediction(predictions=items, model=model.ref)

    return await call.answer(work())


@router.post("/embed", responses=IMAGE_ERRORS, openapi_extra=ONE_IMAGE_ALONE)
async def embed(call: QueryCall) -> Embedding:
    """Return the image's embedding, for comparing images or searching."""
    upload, _ = await call.read_image()
    service, model, deadline = call.service, call.model, call.deadline

    async def work() -> Embedding:
        async with service.batcher.admit(model.embed):
            pixels = await service.decode(upload.data, model, deadline)
            embedding = await service.batcher.run(model.embed, pixels, deadline)
        return Embedding(embedding=embedding.tolist(), model=model.ref)

    return await call.answer(work())


@router.post(
    "/explain",
    responses=IMAGE_ERRORS | {200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}},
    openapi_extra=ONE_IMAGE,
    response_model=Explanation,
)
async def explain(
    call: QueryCall,
    options: AnswerQuery,
    label: Annotated[
        str | SkipJsonSchema[None], Query(max_length=200, description="left out: the most probable class")
    ] = None,
) -> Explanation | Response:
    """Return a heat map of a class in the image; as a picture with `Accept: image/png`."""
    upload, field = await call.read_image()
    prompts = call.free_classes(options.classes, field)
    service, model, deadline = call.service, call.model, call.deadline

    async def work() -> tuple[Explanation, np.ndarray]:
        classes = await choose_classes(call, prompts)
        labels = classes.labels if classes else model.labels
        if label is not None and label not in labels:
            raise Problem("not_found", f"label: {label!r} is no class; classes: {', '.join(labels)[:500]}")
        lane = model.explain_text if classes else model.explain
        async with service.batcher.admit(lane, 2):
            pixels = await service.decode(upload.data, model, deadline)
            probs = (await _scores(call, classes, pixels)).probs
            index = int(np.argmax(probs)) if label is None else labels.index(label)
            direction = classes.embeddings[index] if classes else index
            heat = await service.batcher.run(lane, (pixels, direction), deadline)
        found = Explanation(
            label=labels[index], score=float(probs[index]), heat_map=np.clip(heat, 0, 1).tolist(), model=model.ref
        )
        return found, pixels

    explanation, pixels = await call.answer(work())
    if "image/png" not in call.request.headers.get("accept", ""):
        return explanation
    picture = await asyncio.to_thread(draw_heat_map, pixels, np.asarray(explanation.heat_map, np.float32))
    return Response(picture, media_type="image/png")


@router.get("/models", responses=responses(*ALWAYS))
async def list_models(request: Request) -> Models:
    """Return the models and their loaded versions."""
    service = service_of(request)
    return Models(
        models=[entry.status() for entry in service.models.entries.values()], limits=_limits(service.settings)
    )


@router.post("/models/{name}/load", responses=MODEL_ERRORS)
async def load_model(request: Request, name: ModelName, given: LoadRequest) -> ModelStatus:
    """Load a version, verify and test it, and switch to it; if anything fails, the old one stays active."""
    models = _only_process(request).models
    models.entry(name)
    path = models.folder(given.folder) if given.folder is not None else None
    return _status(await models.load(name, path, given.activate))


@router.post("/models/{name}/activate", responses=MODEL_ERRORS)
async def activate_model(request: Request, name: ModelName, given: ActivateRequest) -> ModelStatus:
    """Switch to a loaded version."""
    return _status(await _only_process(request).models.activate(name, given.version))


@router.post("/models/{name}/classes", responses=MODEL_ERRORS)
async def change_classes(request: Request, name: ModelName, given: ClassesRequest) -> ModelStatus:
    """Add and remove classes by text; this makes a new version and switches to it.

    With a state_dir, the change also applies after loads and restarts of the same model; `reset` reverts all changes.
    """
    service = _only_process(request)
    deadline = deadline_after(service)
    return _status(await service.models.change_classes(name, given.add, given.remove, given.reset, deadline))


@router.delete("/models/{name}/versions/{version}", status_code=204, responses=MODEL_ERRORS)
async def unload_version(
    request: Request, name: ModelName, version: Annotated[str, Path(max_length=100, examples=["3f2a9c01b7de"])]
) -> None:
    """Drop an inactive version."""
    await _only_process(request).models.unload(name, version)


def _limits(settings: Settings) -> Limits:
    kinds = [
        ImageKind(name=one.name, title=one.title, suffixes=[suffix.removeprefix(".") for suffix in one.suffixes])
        for one in readable_formats()
    ]
    return Limits(
        max_image_bytes=settings.max_body_bytes,
        max_video_bytes=settings.max_video_bytes,
        max_megapixels=settings.max_megapixels,
        max_classes=settings.max_classes,
        image_formats=kinds,
    )


def _only_process(request: Request) -> Service:
    """Return the service if it is the only worker; with several, a request would change only one of them."""
    service = service_of(request)
    if service.settings.workers > 1:
        raise Problem("conflict", "there are several workers: change the model's folder and send SIGHUP")
    return service


def _status(entry: Entry) -> ModelStatus:
    return entry.status()
