"""fathom mcp: the library as tools for an agent that starts this command."""

import typer

from rag.settings import load_settings
from ui.console import Home, Model, open_fathom

app = typer.Typer()


@app.command(
    epilog='Examples: fathom mcp  |  in a client\'s settings {"mcpServers": {"fathom": {"command":'
    ' "fathom", "args": ["mcp"]}}}  |  over HTTP: fathom serve --mcp'
)
def mcp(model: Model = None, home: Home = None) -> None:
    """Speak MCP over standard input and output: list documents, ask, read the text."""
    from ui.mcp_server import make_server

    fathom = open_fathom(load_settings(home=home, model=model))
    make_server(lambda _: fathom).run("stdio")
