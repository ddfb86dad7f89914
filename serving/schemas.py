"""The JSON bodies of requests and answers, for OpenAPI."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from serving.problems import ProblemBody

Label = Annotated[str, Field(pattern=r"[^\W_]", max_length=200, examples=["riding a bike"])]  # at least one word
Prompt = Annotated[str, Field(min_length=1, max_length=500, examples=["a photo of a person riding a bike."])]
Probability = Annotated[float, Field(ge=0, le=1)]
DIGEST = "3f2a9c01b7de4c58a1d06f0be92b3d7781f9a4c2e5d6078b9c3a1e4f5d2b6a70"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Given(BaseModel):
    """The body of a request; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class ModelRef(_Frozen):
    """The model that answered."""

    name: str = Field(examples=["har"])
    version: str = Field(examples=[DIGEST[:12]])
    digest: str | None = Field(examples=[DIGEST], description="of the exported folder; null: not sealed")


class Scored(_Frozen):
    """A class and its probability."""

    label: str = Field(examples=["cycling"])
    score: Probability = Field(examples=[0.91])
    sigmoid: Probability | None = Field(
        None,
        examples=[0.87],
        description="probability of this class alone, for a model with a logit bias (SigLIP); left out: it has none",
        exclude_if=lambda value: value is None,
    )


class Answer(_Frozen):
    """The prediction for one image."""

    label: str | None = Field(examples=["cycling"], description="the most probable class; null: abstained")
    score: Probability = Field(examples=[0.91], description="probability of the most probable class")
    top: list[Scored] = Field(description="the most probable classes, the first one first")
    abstained: bool = Field(
        description="whether the score is below the threshold; of a multi-label model, all labels below theirs"
    )
    labels: list[Scored] | None = Field(
        None,
        description="of a multi-label model, the labels that reach their thresholds; left out: an image has one label",
        exclude_if=lambda value: value is None,
    )


class PredictionBody(Answer):
    """Answer of /v1/predict."""

    model: ModelRef
    damage: str | None = Field(None, description="the part of a clip that couldn't be read; left out: none")


class BatchItem(_Frozen):
    """The answer for one image of a batch, or its error."""

    filename: str | None = Field(None, examples=["bike.jpg"])
    label: str | None = None
    score: Probability | None = None
    top: list[Scored] | None = None
    abstained: bool | None = None
    labels: list[Scored] | None = Field(None, exclude_if=lambda value: value is None)
    error: ProblemBody | None = None


class BatchPrediction(_Frozen):
    """Answer of /v1/predict/batch."""

    predictions: list[BatchItem]
    model: ModelRef


class Embedding(_Frozen):
    """Answer of /v1/embed."""

    embedding: list[float] = Field(description="L2-normalised; the cosine of two images is their dot product")
    model: ModelRef


class Explanation(_Frozen):
    """Answer of /v1/explain."""

    label: str = Field(examples=["cycling"])
    score: Probability
    heat_map: list[list[Probability]] = Field(
        description="rows of a square grid over the centre crop that the model sees; 1: most evidence for the label"
    )
    model: ModelRef


class Origin(_Frozen):
    """The training data of a model, and its accuracy on data that it wasn't trained on."""

    trained_on: str | None = Field(None, examples=["12,000 images of folder:photos"])
    judged_on: str | None = Field(None, examples=["the validation images"])
    top1: Probability | None = Field(None, examples=[0.91], description="share of correct predictions")
    num_examples: int | None = Field(None, examples=[1200])


class ModelVersion(_Frozen):
    """A loaded version."""

    version: str
    digest: str | None
    labels: list[str]
    accepts_classes: bool = Field(description="whether it accepts classes in free text")
    abstain_below: float | None
    image_size_px: int
    format: str = Field(examples=["onnx"])
    origin: Origin | None = Field(None, description="where the model comes from; null: the export doesn't say")


class ModelStatus(_Frozen):
    """A name and its versions."""

    name: str
    status: Literal["loading", "ready", "failed"]
    error: str | None = Field(None, description="why the last load failed; the active version stays")
    active: str | None
    versions: list[ModelVersion]


class ImageKind(_Frozen):
    """A readable image format."""

    name: str = Field(examples=["JPEG"])
    title: str = Field(examples=["JPEG"], description="the common name")
    suffixes: list[str] = Field(examples=[["jpg", "jpeg"]])


class Limits(_Frozen):
    """The accepted sizes and formats."""

    max_image_bytes: int = 10_000_000
    max_video_bytes: int = 100_000_000
    max_megapixels: float = 25.0
    max_classes: int = 200
    image_formats: list[ImageKind] = [
        ImageKind(name="JPEG", title="JPEG", suffixes=["jpg", "jpeg"]),
        ImageKind(name="PNG", title="PNG", suffixes=["png"]),
        ImageKind(name="WEBP", title="WebP", suffixes=["webp"]),
    ]


class Models(_Frozen):
    """Answer of /v1/models."""

    models: list[ModelStatus]
    limits: Limits = Limits()


class LoadRequest(_Given):
    """Body of /v1/models/{name}/load."""

    folder: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        examples=["har-2026-11-25"],
        description="a folder in the server's models_dir; left out: the model's own folder, read again",
    )
    activate: StrictBool = True


class ActivateRequest(_Given):
    """Body of /v1/models/{name}/activate."""

    version: str = Field(min_length=1, max_length=100, examples=[DIGEST[:12]])


class ClassesRequest(_Given):
    """Body of /v1/models/{name}/classes."""

    add: dict[Label, list[Prompt]] = Field(
        {},
        max_length=200,
        examples=[{"juggling": ["a photo of a person juggling."]}],
        description="label -> texts that describe it; none: the default prompts",
        json_schema_extra={"additionalProperties": False},
    )
    remove: list[Label] = Field([], max_length=200)
    reset: StrictBool = Field(False, description="start from the model's own classes, not from the current ones")


class EventBody(_Frozen):
    """An action with its start and end."""

    label: str
    start_s: float
    end_s: float | None
    score: Probability = Field(description="mean probability over the event")


class VideoEvents(_Frozen):
    """Answer of POST /v1/stream."""

    events: list[EventBody]
    duration_s: float
    frames: int = Field(description="number of analysed frames")
    damage: str | None = Field(None, description="the part of the video that couldn't be read")
    model: ModelRef


class SegmentBody(_Frozen):
    """An action in a video, with its times."""

    start_s: float
    end_s: float
    label: str
    score: Probability = Field(description="mean probability over the segment")


class VideoAnswer(Answer):
    """Answer of /v1/videos: the prediction of the video as one clip, and its segments."""

    segments: list[SegmentBody]
    duration_s: float
    frames: int = Field(description="number of frames analysed for the segments")
    damage: str | None = Field(None, description="the part of the video that couldn't be read")
    model: ModelRef


def to_scored(labels: tuple[str, ...], probs: Any, top: int, sigmoid: Any = None) -> list[Scored]:
    """Return the `top` most probable classes; `probs` and, for a model with a logit bias, `sigmoid` are [c]."""
    import numpy as np

    order = np.argsort(-probs, kind="stable")[:top]
    alone = [{} if sigmoid is None else {"sigmoid": float(sigmoid[i])} for i in order]
    return [Scored(label=labels[i], score=float(probs[i]), **more) for i, more in zip(order, alone, strict=True)]
