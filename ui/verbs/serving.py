"""fathom serve: the page."""

from typing import Annotated

import typer

from rag.settings import load_settings
from ui.console import Home, Json, Model, err, open_fathom, print_json

app = typer.Typer()


@app.command(epilog="Examples: fathom serve  |  fathom serve --port 8000")
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind (FATHOM_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port (FATHOM_PORT, 7860).")] = None,
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

    serve_page(open_fathom(settings), settings.host, settings.port, on_ready=on_ready)
