"""Tensors of KServe's v2 protocol: in JSON, or as binary data after it."""

import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.images import decode_base64
from serving.models import ServedModel
from serving.problems import Problem

LENGTH = "Inference-Header-Content-Length"
MOST_VALUES = 300_000  # per tensor in JSON: an image of 224 px has 150,528 in nested lists
OUTPUTS = {"probs": "FP32", "logits": "FP32", "label": "BYTES", "image_embeds": "FP32"}


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class InputTensor(_Message):
    """A tensor of a request: `data`, or `parameters.binary_data_size` bytes after the JSON."""

    name: str
    shape: list[Annotated[int, Field(ge=0, le=2**31)]] = Field(max_length=8)
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class OutputRequest(_Message):
    """A requested output."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(_Message):
    """The JSON part of a request."""

    id: str | None = Field(None, max_length=200)
    inputs: list[InputTensor] = Field(max_length=1, min_length=1)
    outputs: list[OutputRequest] = Field([], max_length=8)
    parameters: dict[str, Any] = {}


def parse(body: bytes, json_length: str | None) -> tuple[InferRequest, bytes]:
    if json_length is not None and not (re.fullmatch("[0-9]{1,12}", json_length) and int(json_length) <= len(body)):
        raise Problem("invalid_request", f"{LENGTH}: where in the body the binary tensors begin is needed")
    end = len(body) if json_length is None else int(json_length)
    # Each value is a Python object: ten megabytes of them would block other requests for seconds.
    if body.count(b",", 0, end) > MOST_VALUES or body.count(b"[", 0, end) > MOST_VALUES:
        raise Problem("invalid_request", f"over {MOST_VALUES:,} values in JSON; send the tensor in binary")
    try:
        return InferRequest.model_validate_json(body[:end]), body[end:]
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = " ".join(filter(None, ("body", ".".join(str(part) for part in first["loc"]))))
        code = "malformed" if first["type"] == "json_invalid" else "invalid_request"
        raise Problem(code, f"{where}: {first['msg']}"[:300]) from error


def read_input(tensor: InputTensor, binary: bytes, model: ServedModel, most: int) -> Sequence[np.ndarray | bytes]:
    """Return the images of a request, as pixels or as files, or its clips, as pixels.

    Raises:
      Problem: an unknown tensor, or data that doesn't match its shape.
    """
    count, size = tensor.shape[0] if tensor.shape else 0, tensor.parameters.get("binary_data_size")
    if not 1 <= count <= most:
        raise Problem("invalid_request", f"input {tensor.name[:50]}: 1 to {most} images are taken, not {count}")
    if size is not None and (type(size) is not int or size != len(binary)):
        raise Problem("invalid_request", f"binary_data_size: {len(binary)} bytes follow the JSON")
    if size is None and tensor.data is None:
        raise Problem("invalid_request", "input: data or binary_data_size is needed")
    side = model.backend.preprocess.image_size_px
    if (tensor.name, tensor.datatype) == ("image", "UINT8"):
        if tensor.shape != [count, side, side, 3]:
            raise Problem("invalid_request", f"image: shape [n, {side}, {side}, 3] is needed")
        return _pixels(tensor, binary if size is not None else None)
    if (tensor.name, tensor.datatype) == ("frames", "UINT8"):
        model.need_clips()
        length = tensor.shape[1] if len(tensor.shape) > 1 else 0
        if tensor.shape != [count, length, side, side, 3] or length not in (model.backend.num_frames or length, 1):
            raise Problem("invalid_request", f"frames: shape {clip_shape(model)} is needed; -1 is any number")
        if not 1 <= count * length <= most:
            raise Problem("invalid_request", f"frames: 1 to {most} frames in all are taken, not {count * length}")
        return _pixels(tensor, binary if size is not None else None)
    if (tensor.name, tensor.datatype) == ("image_bytes", "BYTES"):
        if len(tensor.shape) != 1:
            raise Problem("invalid_request", "image_bytes: shape [n] is needed")
        files = list(_split(binary)) if size is not None else _from_base64(tensor.data or [])
        if len(files) != count:
            raise Problem("invalid_request", f"image_bytes: {len(files)} files for a shape of {count}")
        return files
    raise Problem("invalid_request", "input: image or frames (UINT8) or image_bytes (BYTES) is needed")


def clip_shape(model: ServedModel) -> list[int]:
    """Return the shape of `frames`, the clips of a model; -1 means any number."""
    side = model.backend.preprocess.image_size_px
    return [-1, model.backend.num_frames or -1, side, side, 3]


def _pixels(tensor: InputTensor, binary: bytes | None) -> Sequence[np.ndarray]:
    if binary is not None:
        values = np.frombuffer(binary, np.uint8)
    else:
        try:
            given = np.asarray(tensor.data)
        except ValueError as error:  # ragged lists
            raise Problem("invalid_request", f"{tensor.name}: data is ragged") from error
        if given.dtype.kind not in "iu" or (given.size and not 0 <= given.min() <= given.max() <= 255):
            raise Problem("invalid_request", f"{tensor.name}: data must be whole numbers, 0 to 255")
        values = given.astype(np.uint8)
    if values.size != math.prod(tensor.shape):
        raise Problem("invalid_request", f"{tensor.name}: {values.size} values for a shape of {tensor.shape}")
    return list(values.reshape(tensor.shape))


def _split(binary: bytes) -> Iterator[bytes]:
    """Yield BYTES elements: each has its length (4 bytes, little-endian), then its bytes."""
    start = 0
    while start < len(binary):
        if start + 4 > len(binary):
            raise Problem("invalid_request", "image_bytes: cut off")
        (length,) = struct.unpack_from("<I", binary, start)
        start += 4
        if start + length > len(binary):
            raise Problem("invalid_request", "image_bytes: cut off")
        yield binary[start : start + length]
        start += length


def _from_base64(data: list[Any]) -> list[bytes]:
    try:
        return [decode_base64(item) for item in data]
    except (AttributeError, ValueError) as error:
        raise Problem("invalid_request", "image_bytes: data must be base64 texts") from error


def respond(model: ServedModel, asked: InferRequest, outputs: list[tuple[OutputRequest, np.ndarray]]) -> Response:
    described, binary = [], b""
    all_binary = asked.parameters.get("binary_data_output") is True
    for output, array in outputs:
        entry: dict[str, Any] = {"name": output.name, "datatype": OUTPUTS[output.name], "shape": list(array.shape)}
        if output.parameters.get("binary_data", all_binary) is True:
            data = _to_bytes(array)
            entry["parameters"] = {"binary_data_size": len(data)}
            binary += data
        else:
            entry["data"] = array.ravel().tolist()
        described.append(entry)
    answer: dict[str, Any] = {"model_name": model.name, "model_version": model.version, "outputs": described}
    if asked.id is not None:
        answer["id"] = asked.id
    text = json.dumps(answer, allow_nan=False).encode()
    if not binary:
        return Response(text, media_type="application/json")
    return Response(text + binary, media_type="application/octet-stream", headers={LENGTH: str(len(text))})


def _to_bytes(array: np.ndarray) -> bytes:
    if array.dtype != object:
        return array.astype("<f4").tobytes()
    texts = [text.encode() for text in array]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)
