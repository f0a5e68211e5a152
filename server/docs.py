"""`/docs` without the internet: Swagger UI served from here, under a content security policy; and what each problem code means."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, RedirectResponse
from pydantic import BaseModel

from core.errors import NotFound
from server.errors import PROBLEMS

WEB = Path(__file__).parent / "web"
ASSETS = {
    "favicon-32x32.png": WEB / "swagger" / "favicon-32x32.png",
    "init.js": WEB / "docs" / "init.js",
    "swagger-ui-bundle.js": WEB / "swagger" / "swagger-ui-bundle.js",
    "swagger-ui.css": WEB / "swagger" / "swagger-ui.css",
}
# Swagger UI sets styles on elements and draws its icons from data: addresses.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter()


class ProblemMeaning(BaseModel):
    """A problem code, explained."""

    code: str
    status: int
    meaning: str


@router.get("/", include_in_schema=False)
async def go_to_docs() -> RedirectResponse:
    """A browser that is sent to the bare address finds the documentation."""
    return RedirectResponse("/docs")


@router.get("/docs", include_in_schema=False)
async def get_docs() -> FileResponse:
    """The page; everything on it comes from this server."""
    return FileResponse(WEB / "docs" / "index.html", media_type="text/html", headers={"Content-Security-Policy": POLICY})


@router.get("/docs/{name}", include_in_schema=False)
async def get_docs_asset(name: str) -> FileResponse:
    """Scripts and styles of the page."""
    if name not in ASSETS:
        raise NotFound(f"there is no {name!r} below /docs")
    return FileResponse(ASSETS[name], headers={"Cache-Control": "public, max-age=3600", "Content-Security-Policy": POLICY})


@router.get("/problems/{code}", summary="What does a problem code mean?", tags=["health"])
async def get_problem(code: str) -> ProblemMeaning:
    """The `type` of every problem leads here."""
    for cls, (status, known) in PROBLEMS.items():
        if known == code:
            return ProblemMeaning(code=code, status=status, meaning=(cls.__doc__ or "").strip().splitlines()[0])
    raise NotFound(f"there is no problem code {code!r}")
