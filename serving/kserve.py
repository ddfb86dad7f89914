"""The KServe v2 inference protocol (Open Inference Protocol) with binary tensors, for standard clients.

https://github.com/kserve/open-inference-protocol, and Triton's extension for binary tensors.
"""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import BaseModel, Field

from clip_har_jax.inference.backends import probabilities
from serving.api import ALWAYS, BODY, COMPUTED, ModelName
from serving.calls import LONGEST_MS, Call, Timeout, open_call, service_of
from serving.models import ServedModel
from serving.problems import Problem, responses
from serving.requests import ModelChoice
from serving.tensors import LENGTH, OUTPUTS, OutputRequest, clip_shape, parse, read_input, respond

router = APIRouter(prefix="/v2")
VersionName = Annotated[str, Path(max_length=100, examples=["3f2a9c01b7de"])]
DEFAULT_OUTPUTS = ("probs", "label")
ERRORS = responses(*ALWAYS, *BODY, *COMPUTED)


class TensorMetadata(BaseModel):
    """A tensor's name, type and shape; -1: any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The inputs, outputs and parameters of a model."""

    name: str
    versions: list[str]
    platform: str = Field(examples=["onnx"])
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, Any] = Field(
        description="digest: of the exported folder; model_digest: of the model that it was made from; "
        "labels: the classes in their order"
    )


class OutputTensor(BaseModel):
    """A tensor of an answer."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class InferResponse(BaseModel):
    """The JSON of an answer."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


@router.get("", responses=responses(*ALWAYS))
async def server_metadata() -> dict[str, Any]:
    """Return the server's name, version and protocol extensions."""
    return {"name": "clip_har_jax", "version": "1", "extensions": ["binary_tensor_data"]}


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """Return whether the process is alive."""
    return {"live": True}


@router.get("/health/ready", responses=responses("not_ready", "host_not_allowed", "forbidden"))
async def ready(request: Request) -> dict[str, bool]:
    """Return whether requests are answered."""
    service = service_of(request)
    if not service.ready:
        waiting = [entry for entry in service.models.entries.values() if entry.active is None]
        states = ", ".join(f"model {entry.name}: {entry.status().status}" for entry in waiting)
        raise Problem("not_ready", states or "the service starts or ends", retry_after_s=2)
    return {"ready": True}


@router.get("/models/{name}", responses=responses(*ALWAYS, "unknown_model", "invalid_request"))
@router.get("/models/{name}/versions/{version}", responses=responses(*ALWAYS, "unknown_model", "invalid_request"))
async def model_metadata(request: Request, name: ModelName, version: VersionName | None = None) -> ModelMetadata:
    """Return a model's inputs and outputs, its digest and its labels."""
    models = service_of(request).models
    model = models.get(name, version)
    side = model.backend.preprocess.image_size_px
    inputs = [("image", "UINT8", [-1, side, side, 3]), ("image_bytes", "BYTES", [-1])]
    inputs += [("frames", "UINT8", clip_shape(model))] if model.clips is not None else []
    outputs = [(name, kind, _output_shape(model, name)) for name, kind in OUTPUTS.items()]
    return ModelMetadata(
        name=name,
        versions=list(models.entry(name).versions),
        platform=model.backend.graphs.format,
        inputs=[TensorMetadata(name=name, datatype=kind, shape=shape) for name, kind, shape in inputs],
        outputs=[TensorMetadata(name=name, datatype=kind, shape=shape) for name, kind, shape in outputs],
        parameters={
            "digest": model.backend.digest,
            "model_digest": model.backend.model_digest,
            "version": model.version,
            "labels": list(model.labels),
        },
    )


def _output_shape(model: ServedModel, name: str) -> list[int]:
    if name == "label":
        return [-1]
    return [-1, -1 if name == "image_embeds" else len(model.labels)]


@router.get("/models/{name}/ready", responses=responses(*ALWAYS, "unknown_model", "invalid_request"))
@router.get("/models/{name}/versions/{version}/ready", responses=responses(*ALWAYS, "unknown_model", "invalid_request"))
async def model_ready(request: Request, name: ModelName, version: VersionName | None = None) -> dict[str, Any]:
    """Return whether a model is ready."""
    service_of(request).models.get(name, version)
    return {"name": name, "ready": True}


ONE_FILE = {  # the simplest request; the description has others
    "type": "object",
    "required": ["name", "shape", "datatype", "data"],
    "properties": {
        "name": {"const": "image_bytes"},
        "shape": {"const": [1]},
        "datatype": {"const": "BYTES"},
        "data": {"type": "array", "minItems": 1, "maxItems": 1, "items": {"type": "string", "format": "byte"}},
    },
}
REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": ["string", "null"], "maxLength": 200},
        "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": ONE_FILE},
    },
}
INFER_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": REQUEST}}}}


async def _named_call(
    request: Request, name: ModelName, version: VersionName | None = None, timeout_ms: Timeout = LONGEST_MS
) -> Call:
    return open_call(request, ModelChoice(name, version), timeout_ms)


NamedCall = Annotated[Call, Depends(_named_call)]


@router.post("/models/{name}/infer", responses=ERRORS, openapi_extra=INFER_BODY, response_model=InferResponse)
@router.post(
    "/models/{name}/versions/{version}/infer", responses=ERRORS, openapi_extra=INFER_BODY, response_model=InferResponse
)
async def infer(call: NamedCall) -> Response:
    """Predict: `image` (UINT8, resized and cropped), `image_bytes` (BYTES: image files; in JSON base64), or `frames`.

    `frames` are clips, UINT8 [n, frames, height, width, 3]; then `image_embeds` are the embeddings of the clips.
    """
    body = await call.request.body()
    asked, binary = parse(body, call.request.headers.get(LENGTH))
    images = read_input(asked.inputs[0], binary, call.model, call.service.settings.max_batch_images)
    num_images = sum(len(one) if isinstance(one, np.ndarray) and one.ndim == 4 else 1 for one in images)
    call.service.limiter.take(call.request.state.client, num_images - 1)
    wanted = asked.outputs or [OutputRequest(name=name) for name in DEFAULT_OUTPUTS]
    if unknown := [output.name for output in wanted if output.name not in OUTPUTS]:
        raise Problem("invalid_request", f"output {unknown[0][:50]!r} is unknown; there are {', '.join(OUTPUTS)}")
    arrays = await call.answer(_compute(call, images, [output.name for output in wanted]))
    return respond(call.model, asked, [(output, arrays[output.name]) for output in wanted])


async def _compute(call: Call, images: Sequence[np.ndarray | bytes], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the requested outputs, each [n, ...]."""
    service, model, deadline = call.service, call.model, call.deadline
    from_classifier = model.classes is None and set(names) != {"image_embeds"}
    with_embeddings = "image_embeds" in names or not from_classifier
    classify, embed = model.classify, model.embed
    if isinstance(images[0], np.ndarray) and images[0].ndim == 4:
        clips = model.need_clips()
        classify, embed = clips.whole, clips.whole_embeds
    lanes = [classify] * from_classifier + [embed] * with_embeddings

    async def one(image: np.ndarray | bytes) -> list[np.ndarray]:
        pixels = await service.decode(image, model, deadline) if isinstance(image, bytes) else image
        return await asyncio.gather(*(service.batcher.run(lane, pixels, deadline) for lane in lanes))

    async with service.batcher.admit(lanes[0], len(images) * len(lanes)):
        rows = await asyncio.gather(*map(one, images))
    arrays: dict[str, np.ndarray] = {}
    if with_embeddings:
        arrays["image_embeds"] = np.stack([row[-1] for row in rows])
    if from_classifier:
        arrays["logits"] = np.stack([row[0] for row in rows])
    elif model.classes is not None:
        arrays["logits"] = model.classes.logits(arrays["image_embeds"])
    if "logits" in arrays:
        arrays["probs"] = probabilities(arrays["logits"], model.actions.multi_label)
        arrays["label"] = np.asarray([model.labels[i] for i in arrays["logits"].argmax(axis=-1)], object)
    return arrays
