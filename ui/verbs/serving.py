"""fathom serve: the page."""

from typing import Annotated

import typer

from rag.settings import load_settings
from ui.console import Home, Json, Model, err, open_fathom, print_json

app = typer.Typer()


@app.command(epilog="Examples: fathom serve  |  fathom serve --port 8000  |  fathom serve --mcp")
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind (FATHOM_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port (FATHOM_PORT, 7860).")] = None,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Answer agents at /mcp, too: fathom users key NAME.")
    ] = False,
    model: Model = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Serve the chat in the browser."""
    from ui.app import serve as serve_page

    settings = load_settings(home=home, model=model, host=host, port=port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"

    def on_ready() -> None:
        if as_json:
            print_json({"url": url})
        err.print(f"Fathom is at {url} (stop it with Ctrl-C)")
        if mcp:
            err.print(f"agents speak MCP at {url}/mcp")

    fathom = open_fathom(settings)
    serve_page(fathom, settings.host, settings.port, with_mcp=mcp, on_ready=on_ready)
