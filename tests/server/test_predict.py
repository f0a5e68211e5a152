"""/predict says what Pillow and the network say, and refuses everything that is no image with a reason."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from core.errors import Overloaded, StorageDamaged
from server.predictor import Predictor
from tests.ml import builders_images as images
from tests.server.builders_service import COLORS, PREPROCESSING, Service, add_generation, running_service, write_generation_files

RED = images.encode(Image.new("RGB", (20, 10), (250, 20, 10)))
BLUE = images.encode(Image.new("RGB", (20, 10), (10, 20, 250)))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that serves the color network, at temperature 2."""
    with running_service(tmp_path_factory.mktemp("service")) as running:
        running.promote(add_generation(running)).raise_for_status()
        yield running


def expected_probabilities(rgb: Image.Image, *, temperature: float) -> dict[str, float]:
    """By hand: the mean of each channel of the resized picture, times 10, through a softmax."""
    small = np.asarray(rgb.resize((8, 8), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    red, green, blue = 10 * small.mean(axis=(0, 1)) / temperature
    total = math.exp(red) + math.exp(green) + math.exp(blue)
    return {"blue": math.exp(blue) / total, "green": math.exp(green) / total, "red": math.exp(red) / total}


def listed(prediction: dict[str, Any]) -> dict[str, float]:
    return {candidate["label"]: candidate["probability"] for candidate in prediction["top"]}


def over_white(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def plain(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def rotated(data: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def divided_by_257(data: bytes) -> Image.Image:
    deep = np.asarray(Image.open(io.BytesIO(data))).astype(np.int64)
    return Image.fromarray(np.rint(deep / 257).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(
    ("data", "read"),
    [
        (RED, plain),
        (images.image_bytes(1, "JPEG"), plain),
        (images.image_bytes(2, "BMP"), plain),
        (images.palette_png(), plain),
        (images.cmyk_jpeg(), plain),
        (images.rotated_jpeg(6), rotated),
        (images.deep_gray_png(), divided_by_257),
        (images.alpha_png(), over_white),
        (images.transparent_palette_png(), over_white),
        (images.animated_webp(), plain),
        (images.animated_png(), plain),
    ],
    ids=["png", "jpeg", "bmp", "palette", "cmyk", "exif", "16-bit", "alpha", "transparent-palette", "animated-webp", "animated-png"],
)
def test_every_odd_image_gets_the_answer_of_pillows_pixels(service: Service, data: bytes, read: Any) -> None:
    response = service.client.post("/predict", content=data)

    assert response.status_code == 200, response.text
    expected = expected_probabilities(read(data), temperature=2)
    assert listed(response.json()) == pytest.approx(expected, abs=1e-5)
    assert response.json()["label"] == max(expected, key=expected.__getitem__)


@pytest.mark.parametrize(
    ("data", "status", "code", "image_status"),
    [
        (b"just some words", 415, "unsupported_media", "unsupported"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_media", "unsupported"),
        (images.gif(), 415, "unsupported_media", "unsupported"),
        (b"", 422, "bad_image", "empty"),
        (images.truncated_jpeg(), 422, "bad_image", "undecodable"),
        (images.huge_header_png(), 422, "bad_image", "too_large"),
    ],
    ids=["text", "svg", "gif", "empty", "truncated", "100-megapixel-header"],
)
def test_what_is_no_image_is_refused_with_its_reason(service: Service, data: bytes, status: int, code: str, image_status: str) -> None:
    response = service.client.post("/predict", content=data, headers={"content-type": "image/jpeg"})

    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert (response.json()["code"], response.json()["details"]["image_status"]) == (code, image_status)


def test_before_any_promotion_predict_says_what_to_do(service: Service) -> None:
    response = service.client.post("/predict", params={"alias": "staging"}, content=RED)

    assert (response.status_code, response.json()["code"]) == (503, "nothing_promoted")
    assert "PUT /api/v1/aliases/staging" in response.json()["detail"]
    assert "retry-after" in response.headers


def test_probabilities_before_temperature_are_there_on_request(service: Service) -> None:
    response = service.client.post("/predict", params={"calibrated": False}, content=RED)

    assert listed(response.json()) == pytest.approx(expected_probabilities(plain(RED), temperature=1), abs=1e-5)


def test_top_k_lists_the_most_probable_classes_in_falling_order(service: Service) -> None:
    prediction = service.client.post("/predict", params={"top_k": 2}, content=RED).json()

    assert [candidate["label"] for candidate in prediction["top"]] == ["red", "green"]
    assert prediction["confidence"] == prediction["top"][0]["probability"]


def test_below_the_threshold_it_abstains(service: Service) -> None:
    sure = service.client.post("/predict", params={"abstain_below": 0.5}, content=RED).json()
    unsure = service.client.post("/predict", params={"abstain_below": 0.999}, content=RED).json()

    assert (sure["label"], sure["abstained"]) == ("red", False)
    assert (unsure["label"], unsure["abstained"], unsure["confidence"]) == (None, True, sure["confidence"])


def test_a_pinned_generation_answers_whatever_the_alias_says(service: Service) -> None:
    wrong = add_generation(service, rotate=1)

    pinned = service.client.post("/predict", params={"generation": wrong}, content=RED).json()
    aliased = service.client.post("/predict", content=RED).json()

    assert (pinned["generation_id"], pinned["alias"], pinned["label"]) == (wrong, None, "blue")
    assert (aliased["alias"], aliased["label"]) == ("production", "red")


def test_a_misspelled_parameter_is_refused_with_the_one_that_was_meant(service: Service) -> None:
    response = service.client.post("/predict", params={"topk": 3}, content=RED)

    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert "did you mean top_k?" in response.json()["detail"]


def test_a_pinned_generation_that_does_not_exist_is_not_found(service: Service) -> None:
    response = service.client.post("/predict", params={"generation": "gen_no"}, content=RED)

    assert (response.status_code, response.json()["code"]) == (404, "not_found")


def test_of_several_files_a_bad_one_is_an_error_at_its_own_place(service: Service) -> None:
    files = [("images", ("a.png", RED)), ("images", ("b.gif", images.gif())), ("images", ("c.png", BLUE))]

    answer = service.client.post("/predict/images", files=files).json()

    first, second, third = answer["predictions"]
    assert (first["label"], third["label"]) == ("red", "blue")
    assert (second["error"]["code"], second["error"]["status"]) == ("unsupported_media", 415)
    assert answer["generation_id"] == service.get("/aliases/production").json()["generation_id"]


def test_of_several_base64_images_a_bad_one_is_an_error_at_its_own_place(service: Service) -> None:
    body = {"images": [base64.b64encode(RED).decode(), "not base64!", "", base64.b64encode(BLUE).decode()]}

    answer = service.client.post("/predict/json", json=body).json()

    assert [row.get("label") or row["error"]["code"] for row in answer["predictions"]] == ["red", "invalid_request", "bad_image", "blue"]


def test_more_images_than_the_queue_holds_are_too_many_for_one_request(service: Service) -> None:
    response = service.client.post("/predict/json", json={"images": [""] * 65})

    assert (response.status_code, response.json()["code"]) == (413, "payload_too_large")


def make_predictor(tmp_path: Any, **options: Any) -> Predictor:
    folder = tmp_path / "generation"
    facts = {"num_correct": None, "num_images": 0, "scale": 10.0, "rotate": 0, "temperature": 1.0, "num_outputs": 3} | {
        name: options.pop(name) for name in ("scale", "num_outputs") if name in options
    }
    write_generation_files(folder, **facts)
    files = {path.name: path for path in folder.iterdir()}
    return Predictor(lambda _: files, **({"num_threads": 1, "queue_images": 64, "deadline_seconds": 10.0} | options))


def test_a_full_queue_refuses_all_images_of_a_request_and_says_when_to_come_back(tmp_path: Any) -> None:
    predictor = make_predictor(tmp_path, queue_images=1)
    generation = predictor.load("gen")

    with pytest.raises(Overloaded) as refused:
        predictor.submit([RED] * 3, generation)
    answers = [future.result() for future in predictor.submit([RED] * 2, generation)]

    assert refused.value.details["retry_after_seconds"] >= 1
    assert [answer.generation_id for answer in answers] == ["gen", "gen"]
    predictor.close()


def test_an_image_that_waited_too_long_is_refused_not_answered_late(tmp_path: Any) -> None:
    predictor = make_predictor(tmp_path, deadline_seconds=1e-9)

    [future] = predictor.submit([RED], predictor.load("gen"))

    with pytest.raises(Overloaded, match="waited"):
        future.result()
    predictor.close()
    assert predictor.num_inside == 0


@pytest.mark.parametrize("fault", [{"num_outputs": 2}, {"scale": math.nan}])
def test_a_generation_that_cannot_answer_is_never_served(tmp_path: Any, fault: dict[str, Any]) -> None:
    predictor = make_predictor(tmp_path, **fault)

    with pytest.raises(StorageDamaged):
        predictor.load("gen")

    assert predictor.find("gen") is None
    predictor.close()


def test_pinned_generations_beyond_the_kept_ones_leave_the_memory(tmp_path: Any) -> None:
    predictor = make_predictor(tmp_path, kept_generations=2)

    first = predictor.load("gen-1")
    predictor.load("gen-2")
    again = predictor.load("gen-1")
    predictor.load("gen-3")

    assert again is first
    assert predictor.kept() == ["gen-1", "gen-3"]
    predictor.close()


def test_a_late_word_about_an_earlier_move_changes_nothing(tmp_path: Any) -> None:
    predictor = make_predictor(tmp_path)
    old, new = predictor.load("gen-1"), predictor.load("gen-2")

    assert predictor.switch("production", new, version=2)
    assert not predictor.switch("production", old, version=1)

    assert predictor.serving("production") is new
    predictor.close()


def test_the_builders_network_reads_the_preprocessing_it_was_exported_with(tmp_path: Any) -> None:
    predictor = make_predictor(tmp_path)

    served = predictor.load("gen")

    assert (served.preprocessing, served.class_names) == (PREPROCESSING, COLORS)
    predictor.close()


def test_the_metrics_say_how_many_images_were_answered_and_where_their_time_went(service: Service) -> None:
    def counted(part: str) -> float:
        lines = service.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(f'noisy_student_predict_seconds_count{{part="{part}"}}'))

    before = {part: counted(part) for part in ("queue", "decode", "model")}
    service.client.post("/predict", content=RED).raise_for_status()
    assert service.client.post("/predict", content=b"no image").status_code == 415

    assert {part: counted(part) - count for part, count in before.items()} == {"queue": 1, "decode": 1, "model": 1}
