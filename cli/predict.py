"""`noisy-student predict FILE…`: asks the service what is in these images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.client import ApiProblem, Client
from cli.invocation import get_invocation


def predict(
    context: typer.Context,
    *,
    files: Annotated[list[Path], typer.Argument(help="JPEG, PNG, WebP or BMP.")],
    alias: Annotated[str, typer.Option(help="Whose generation answers.")] = "production",
    generation: Annotated[str | None, typer.Option(help="This generation answers, whatever the alias says.")] = None,
    top_k: Annotated[int, typer.Option(help="Classes listed with --json.", min=1)] = 5,
    abstain_below: Annotated[float | None, typer.Option(help="No label when the confidence is lower.", min=0.0, max=1.0)] = None,
) -> int:
    """Ask the service about image files; 1 when one of them cannot be answered."""
    invocation = get_invocation(context)
    asked = {"alias": alias, "generation": generation, "top_k": top_k, "abstain_below": abstain_below}
    answers = [ask(invocation.client, path, **asked) for path in files]
    if invocation.output.as_json:
        invocation.output.result(answers, "")
    else:
        columns = {"file": "file", "label": "label", "confidence": "confidence", "generation": "generation_id"}
        if answered := [answer for answer in answers if "error" not in answer]:
            invocation.output.table(answered, columns)
        for answer in answers:
            if "error" in answer:
                invocation.output.error(f"{answer['file']}: {answer['error']['message']}")
    return 1 if any("error" in answer for answer in answers) else 0


def ask(client: Client, path: Path, **asked: Any) -> dict[str, Any]:
    """One file's answer, or `error` with what was wrong with that file."""
    try:
        content = path.read_bytes()
    except IsADirectoryError:
        return {"file": str(path), "error": {"code": "cannot_read", "message": "this is a folder; give its files, for example with /*"}}
    except OSError as error:
        return {"file": str(path), "error": {"code": "cannot_read", "message": str(error.strerror)}}
    try:
        answer: dict[str, Any] = client.request(
            "POST", "/predict", params=asked, content=content, headers={"Content-Type": "application/octet-stream"}, again=True
        ).json()
    except ApiProblem as problem:
        # What is wrong with the image is one file's affair; everything else would be said once per file.
        if problem.status not in (413, 415, 422):
            raise
        return {"file": str(path), "error": {"code": problem.code, "message": problem.detail}}
    return {"file": str(path), **answer}
