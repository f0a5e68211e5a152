"""Ask a generation about images: one as raw bytes, several as multipart or base64 JSON."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Query, Request, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from core.errors import InvalidRequest, PayloadTooLarge, PredictElsewhere, ServiceError, UnsupportedMedia
from server.dependencies import Services, ServicesDep, make_router
from server.errors import to_problem
from server.openapi import problems
from server.predictor import Answer, ServedGeneration

router = make_router("predict", prefix="")

elsewhere = APIRouter()
"""What stands in their place in an API that leaves /predict to replicas."""

_REFUSALS = problems(404, 409, 413, 415, 429)


@dataclass(frozen=True, slots=True)
class Question:
    """What a request wants to know, of whom."""

    alias: str
    generation: str | None
    top_k: int
    abstain_below: float | None
    calibrated: bool


async def read_question(
    alias: Annotated[str, Query(max_length=63, description="Whose generation answers.")] = "production",
    generation: Annotated[str | None, Query(max_length=100, description="This generation answers, whatever the alias says.")] = None,
    top_k: Annotated[int, Query(ge=1, le=1000, description="Classes listed in `top`.")] = 5,
    abstain_below: Annotated[float | None, Query(ge=0, le=1, description="No label when the confidence is lower.")] = None,
    calibrated: Annotated[bool, Query(description="Off: probabilities before temperature.")] = True,
) -> Question:
    """Dependency: the parameters that every way of asking shares."""
    return Question(alias, generation, top_k, abstain_below, calibrated)


QuestionDep = Annotated[Question, Depends(read_question)]


class Candidate(BaseModel):
    """One class and its probability."""

    label: str
    probability: float


class Timings(BaseModel):
    """Where the time went, in milliseconds."""

    decode: float
    model: float
    queue: float


class Prediction(BaseModel):
    """What is in one image."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    label: str | None
    """The most probable class; null when abstained."""
    confidence: float
    """Its probability."""
    abstained: bool
    top: list[Candidate]


class SinglePrediction(Prediction):
    """What is in the image, who says so, and how long it took."""

    generation_id: str
    alias: str | None
    """Null when the generation was pinned."""
    timings_ms: Timings


class ImageProblem(BaseModel):
    """Why one image of several has no answer."""

    code: str
    message: str
    status: int


class RefusedImage(BaseModel):
    """One image of several that cannot be answered; the others are."""

    error: ImageProblem


class Predictions(BaseModel):
    """One entry per image in the order of the request, all by one generation."""

    generation_id: str
    alias: str | None
    predictions: list[Prediction | RefusedImage]
    timings_ms: Timings


class Base64Images(BaseModel):
    """Images as base64 text."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [{"images": ["iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEANl9ngAAAAABJRU5ErkJggg=="]}]
        },
    )

    images: Annotated[list[str], Field(min_length=1)]


@router.post(
    "/predict",
    summary="What is in this image?",
    responses=_REFUSALS,
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "The bytes of a JPEG, PNG, WebP or BMP file. Its content counts, not the declared type.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def predict(request: Request, services: ServicesDep, question: QuestionDep) -> SinglePrediction:
    """The image as raw bytes: `curl --data-binary @rose.jpg`. Probabilities are calibrated."""
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise UnsupportedMedia("this takes one image as the whole body (`curl --data-binary @rose.jpg`); send forms to /predict/images")
    served = await _resolve(services, question)
    [future] = services.serving.predictor.submit([await request.body()], served)
    answer = await asyncio.wrap_future(future)
    return SinglePrediction(
        **_look_at(answer, question),
        generation_id=answer.generation_id,
        alias=None if question.generation else question.alias,
        timings_ms=_timings([answer]),
    )


@router.post("/predict/images", summary="What is in these files?", responses=_REFUSALS)
async def predict_images(
    services: ServicesDep, question: QuestionDep, images: Annotated[list[UploadFile], File(description="Image files.")]
) -> Predictions:
    """Several files as multipart/form-data. A file that is no image is an error at its own place; the others are answered."""
    served = await _resolve(services, question)
    return await _answer_all(services, question, served, [await image.read() for image in images])


@router.post("/predict/json", summary="What is in these images, sent as base64?", responses=_REFUSALS)
async def predict_json(services: ServicesDep, question: QuestionDep, body: Base64Images) -> Predictions:
    """Several images in one JSON body. What is no base64, or no image, is an error at its own place."""
    served = await _resolve(services, question)
    return await _answer_all(services, question, served, [_decode_base64(text) for text in body.images])


@elsewhere.api_route("/predict{rest:path}", methods=["GET", "POST"], include_in_schema=False)
def point_elsewhere(services: ServicesDep) -> None:
    """Where to ask instead."""
    url = services.settings.predict_url
    where = f"ask {url}" if url else "ask where `python -m server --predictor` listens"
    raise PredictElsewhere(f"this API leaves /predict to predictor replicas: {where}", **({"url": url} if url else {}))


async def _resolve(services: Services, question: Question) -> ServedGeneration:
    """In memory it is there at once; else a thread loads it, so that other requests go on."""
    serving = services.serving
    found = serving.in_memory(alias=question.alias, generation_id=question.generation)
    if found is not None:
        return found
    return await run_in_threadpool(serving.resolve, alias=question.alias, generation_id=question.generation)


def _decode_base64(text: str) -> bytes | ServiceError:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return InvalidRequest(f"not base64: {error}")


async def _answer_all(
    services: Services, question: Question, served: ServedGeneration, images: Sequence[bytes | ServiceError]
) -> Predictions:
    predictor = services.serving.predictor
    if len(images) > predictor.queue_images:
        raise PayloadTooLarge(f"{len(images)} images in one request; at most {predictor.queue_images} are answered together")
    futures = iter(predictor.submit([image for image in images if isinstance(image, bytes)], served))
    waiting: list[Any] = [asyncio.wrap_future(next(futures)) if isinstance(image, bytes) else None for image in images]
    # Every future is awaited, also after one failed, so that no error is left behind unseen.
    done = await asyncio.gather(*(future for future in waiting if future is not None), return_exceptions=True)
    results = iter(done)
    outcomes = [image if isinstance(image, ServiceError) else next(results) for image in images]
    return Predictions(
        generation_id=served.id,
        alias=None if question.generation else question.alias,
        predictions=[_show_outcome(outcome, question) for outcome in outcomes],
        timings_ms=_timings([outcome for outcome in outcomes if isinstance(outcome, Answer)]),
    )


def _show_outcome(outcome: Answer | BaseException, question: Question) -> Prediction | RefusedImage:
    if isinstance(outcome, Answer):
        return Prediction(**_look_at(outcome, question))
    if not isinstance(outcome, ServiceError):
        raise outcome
    problem = to_problem(outcome)
    return RefusedImage(error=ImageProblem(code=problem.code, message=problem.detail, status=problem.status))


def _look_at(answer: Answer, question: Question) -> dict[str, Any]:
    """The fields of a Prediction."""
    probabilities = answer.probabilities(calibrated=question.calibrated)
    # Sorting is stable: of equal probabilities the class that comes first wins, as in evaluation and labeling.
    order = sorted(range(len(probabilities)), key=probabilities.__getitem__, reverse=True)
    top = [Candidate(label=answer.class_names[index], probability=probabilities[index]) for index in order[: question.top_k]]
    abstained = question.abstain_below is not None and top[0].probability < question.abstain_below
    return {"label": None if abstained else top[0].label, "confidence": top[0].probability, "abstained": abstained, "top": top}


def _timings(answers: Sequence[Answer]) -> Timings:
    """Summed over the images; of waiting, the longest."""
    return Timings(
        decode=round(1000 * sum(answer.decode_seconds for answer in answers), 3),
        model=round(1000 * sum(answer.model_seconds for answer in answers), 3),
        queue=round(1000 * max((answer.queue_seconds for answer in answers), default=0.0), 3),
    )
