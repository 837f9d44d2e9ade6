"""Agents: the official client asks over HTTP with a key, and over standard input and output."""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import HANDBOOK, HashEmbedder
from rag.settings import Settings
from served import serving
from ui.assembly import Fathom

pytest.importorskip("mcp", reason="the package mcp is not installed")

pytestmark = pytest.mark.usefixtures("cheap_hashes")
ROOT = Path(__file__).resolve().parents[1]
QUESTION = "What is the harbour fee?"
AGENT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from pathlib import Path
from conftest import HashEmbedder, make_tiny_engine
from rag.settings import Settings
from ui.assembly import Fathom
from ui.mcp_server import make_server
settings = Settings(home=Path(sys.argv[3]), max_new_tokens=16, kv_reserve_bytes=0)
fathom = Fathom(settings, embedder=HashEmbedder(), engine=make_tiny_engine())
make_server(lambda _: fathom).run("stdio")
"""


@pytest.fixture
def url(library: Fathom, tmp_path: Path) -> Iterator[str]:
    """Serve a library in which anna has the handbook and ben has nothing."""
    for name in ("anna", "ben"):
        library.accounts.add(name, "correct horse battery")
    path = tmp_path / "handbook.md"
    path.write_text(HANDBOOK)
    library.for_owner("anna").ingest(path, source="upload:handbook.md")
    with serving(library, with_mcp=True) as address:
        yield f"{address}/mcp"


async def use(server: Any, *calls: tuple[str, dict[str, Any]]) -> list[Any]:  # noqa: ANN401
    """Return what the tools say: an object, or the words of an error."""
    from mcp import Client

    told: list[Any] = []
    async with Client(server) as client:
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert names == {"list_documents", "ask", "read_text"}
        for name, arguments in calls:
            result = await client.call_tool(name, arguments)
            text = "".join(getattr(block, "text", "") for block in result.content)
            told.append(text if result.is_error else json.loads(text))
    return told


async def over_http(url: str, key: str, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client

    headers = {"Authorization": f"Bearer {key}"}
    async with create_mcp_http_client(headers=headers) as http:
        return await use(streamable_http_client(url, http_client=http), *calls)


def test_an_agent_lists_asks_and_reads_what_is_its_owners(library: Fathom, url: str) -> None:
    anna, ben = (library.accounts.make_key(name) for name in ("anna", "ben"))
    listed, answer, unknown = asyncio.run(
        over_http(
            url,
            anna,
            ("list_documents", {}),
            ("ask", {"question": QUESTION, "documents": ["handbook.md"], "route": "retrieval"}),
            ("ask", {"question": QUESTION, "documents": ["no-such.md"]}),
        )
    )
    (document,) = listed["documents"]
    assert document["title"] == "handbook.md"
    assert "source" not in document
    assert answer["receipt"]["route"] == "retrieval"
    (cited, *_) = answer["citations"]
    assert "no-such.md" in unknown
    receipt = library.for_owner("anna").receipts.load(answer["receipt"]["id"])
    assert receipt.answer == answer["answer"]
    place = {"document": cited["document"], "start": cited["start"], "length": len(cited["quote"])}
    (read,) = asyncio.run(over_http(url, anna, ("read_text", place)))
    assert read["text"] == cited["quote"]
    assert read["of"] == len(HANDBOOK)

    nothing, refused, no_text = asyncio.run(
        over_http(
            url,
            ben,
            ("list_documents", {}),
            ("ask", {"question": QUESTION}),
            ("read_text", {"document": document["id"]}),
        )
    )
    assert nothing == {"documents": [], "start": 0, "of": 0}
    assert "no document" in refused
    assert "no document" in no_text
    assert "handbook" not in json.dumps([nothing, refused, no_text])


def test_without_a_key_or_from_another_site_there_is_nothing(library: Fathom, url: str) -> None:
    asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    headers = {"Accept": "application/json, text/event-stream"}
    assert httpx.post(url, json=asked, headers=headers).status_code == 401
    headers["Authorization"] = f"Bearer {library.accounts.make_key('anna')}"
    foreign = headers | {"Origin": "http://evil.example"}
    assert httpx.post(url, json=asked, headers=foreign).status_code == 403
    with serving(library) as without:
        assert httpx.post(f"{without}/mcp", json=asked, headers=headers).status_code == 404


def test_an_agent_starts_the_command_and_speaks_over_its_pipes(settings: Settings) -> None:
    from mcp.client.stdio import StdioServerParameters

    path = settings.home / "handbook.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HANDBOOK)
    Fathom(settings, embedder=HashEmbedder()).ingest(path)
    arguments = ["-c", AGENT, str(ROOT), str(ROOT / "tests"), str(settings.home)]
    server = StdioServerParameters(command=sys.executable, args=arguments)
    listed, answer = asyncio.run(
        use(server, ("list_documents", {}), ("ask", {"question": QUESTION}))
    )
    assert [document["title"] for document in listed["documents"]] == ["handbook.md"]
    assert answer["receipt"]["id"]
