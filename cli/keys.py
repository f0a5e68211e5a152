"""`noisy-student keys`: who may do what."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.client import API
from cli.invocation import get_invocation
from core.lifecycle import SCOPES

app = typer.Typer(no_args_is_help=True, help="API keys: create, list, revoke.")


@app.command("create")
def create(
    context: typer.Context,
    *,
    name: Annotated[str, typer.Argument(help="For people: who or what uses it.")],
    scope: Annotated[list[str], typer.Option(help=f"May be repeated: {', '.join(SCOPES)}.")],
) -> None:
    """Make a key; its secret is shown this once."""
    invocation = get_invocation(context)
    # Not repeated after a broken connection: a second key would be made whose secret nobody saw.
    key = invocation.client.request("POST", f"{API}/api-keys", body={"name": name, "scopes": scope}).json()
    invocation.output.result(key, f"{key['id']} may {', '.join(key['scopes'])}; its secret, shown this once:\n{key['secret']}")


@app.command("list")
def list_keys(context: typer.Context) -> None:
    """List keys, revoked ones too."""
    invocation = get_invocation(context)
    keys = list(invocation.client.pages(f"{API}/api-keys"))
    invocation.output.table(keys, {"key": "id", "name": "name", "scopes": "scopes", "created": "created_at", "revoked": "revoked_at"})


@app.command("revoke")
def revoke(context: typer.Context, *, key: Annotated[str, typer.Argument(help="Its id.")]) -> None:
    """Revoke a key; it opens nothing any more."""
    invocation = get_invocation(context)
    invocation.client.delete(f"{API}/api-keys/{key}")
    invocation.output.result({"revoked": key}, f"key {key} is revoked")
