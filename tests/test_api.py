"""The HTTP API: who gets in, who gets what, and OpenAI's own client against it."""

import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openai import APIStatusError, AuthenticationError, OpenAI
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from conftest import HANDBOOK
from documents import pdf_line, write_pdf
from rag.errors import ServeError
from served import serving
from ui.app import serve
from ui.assembly import Fathom
from ui.sign_in import COOKIE

pytestmark = pytest.mark.usefixtures("cheap_hashes")
PASSWORD = "correct horse battery"
QUESTION = "What is the harbour fee?"
SECRET = "The zolothurn lies under the third bollard.\n"
PAGE = "text/html,application/xhtml+xml"


class Person:
    """Somebody with an account, a key and an HTTP client that sends it."""

    def __init__(self, fathom: Fathom, url: str, name: str) -> None:
        fathom.accounts.add(name, PASSWORD)
        self.name, self.url = name, url
        self.key = fathom.accounts.make_key(name)
        headers = {"Authorization": f"Bearer {self.key}"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=60)
        self.openai = OpenAI(base_url=f"{url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def upload(self, name: str, content: str | bytes) -> dict[str, Any]:
        """Upload a file and return the document."""
        answer = self.http.post("/v1/documents", files=[("files", (name, content))])
        assert answer.status_code == 201, answer.text
        document: dict[str, Any] = answer.json()[0]["document"]
        return document


@pytest.fixture
def url(library: Fathom) -> Iterator[str]:
    """Serve an empty library without accounts."""
    with serving(library) as address:
        yield address


@pytest.fixture
def anna(library: Fathom, url: str) -> Iterator[Person]:
    """Return somebody who may use the API."""
    person = Person(library, url, "anna")
    yield person
    person.http.close()
    person.openai.close()


@pytest.fixture
def ben(library: Fathom, url: str) -> Iterator[Person]:
    """Return somebody else."""
    person = Person(library, url, "ben")
    yield person
    person.http.close()
    person.openai.close()


# ---- the door ----------------------------------------------------------------------------------


def test_without_accounts_one_person_is_served_on_this_machine(url: str) -> None:
    with httpx.Client(base_url=url, timeout=30) as http:
        assert http.get("/v1/documents").json() == []
        assert http.get("/login").headers["location"] == "/"
        assert http.get("/v1/documents", headers={"Host": "evil.example"}).status_code == 400
        for headers in (
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ):
            refused = http.delete("/v1/documents/1", headers=headers)
            assert refused.status_code == 403, headers
        own = {"Origin": url, "Sec-Fetch-Site": "same-origin"}
        assert http.delete("/v1/documents/1", headers=own).status_code == 404


def test_a_public_address_without_accounts_is_refused(small_fathom: Fathom) -> None:
    with pytest.raises(ServeError, match="nobody has to sign in") as caught:
        serve(small_fathom, "0.0.0.0", 0)
    assert "fathom users add" in caught.value.hint


def test_a_public_server_lets_nobody_in_once_the_last_account_is_gone(library: Fathom) -> None:
    library.accounts.add("anna", PASSWORD)
    with serving(library, is_public=True) as address:
        key = library.accounts.make_key("anna")
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{address}/v1/documents", headers=headers).status_code == 200
        library.remove_account("anna")
        assert httpx.get(f"{address}/v1/documents", headers=headers).status_code == 401
        assert httpx.get(f"{address}/v1/documents").status_code == 401


def test_files_of_one_name_in_two_folders_are_two_documents(anna: Person) -> None:
    def upload(path: str, names: tuple[str, ...], words: str) -> list[dict[str, Any]]:
        files = [("files", (name, f"{words} {name}.\n" * 5, "text/plain")) for name in names]
        lines = anna.http.post(path, files=files, timeout=60)
        assert lines.is_success, lines.text
        return list(lines.json()) if path == "/v1/documents" else []

    names = ("docs/README.md", "src/README.md", "../../etc/x.md")
    first = upload("/v1/documents", names, "First")
    titles = ["docs/README.md", "src/README.md", "etc/x.md"]
    assert [outcome["title"] for outcome in first] == titles
    upload("/uploads", names[1:2], "Second")  # what the page sends
    versions = {d["title"]: d["version"] for d in anna.http.get("/v1/documents").json()}
    assert versions == dict.fromkeys(titles, 1) | {"src/README.md": 2}


def test_without_a_key_there_is_nothing(anna: Person, url: str) -> None:
    paths = ["/v1/documents", "/v1/models", "/docs", "/openapi.json", "/config", "/v1/nothing"]
    paths += ["/gradio_api/info", "/gradio_api/openapi.json", "/theme.css", "/v1/receipts/x"]
    paths += [
        "/gradio_api/file=/etc/passwd",
        "/documents/1/pages/1.png",
        "/gradio_api/startup-events",
    ]
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {anna.key}"}):
        for path in paths:
            answer = httpx.get(f"{url}{path}", headers=headers)
            assert answer.status_code == 401, path
            assert set(answer.json()) == {"error"}
        for path in ("/v1/documents", "/v1/questions", "/gradio_api/queue/join", "/uploads"):
            assert httpx.post(f"{url}{path}", json={}, headers=headers).status_code == 401
    page = httpx.get(url, headers={"Accept": PAGE})
    assert (page.status_code, page.headers["location"]) == (303, "/login")
    assert httpx.get(f"{url}/healthz").json() == {"ok": True}
    assert anna.http.get("/docs").status_code == 200
    paths_told = anna.http.get("/openapi.json").json()["paths"]
    assert "/v1/questions" in paths_told
    assert "/v1/chat/completions" in paths_told


def sign_in(url: str, name: str, password: str, **headers: str) -> httpx.Response:
    """Send the sign-in form."""
    form = {"name": name, "password": password}
    return httpx.post(f"{url}/login", data=form, headers=headers, timeout=30)


def test_a_password_opens_a_session_that_ends(anna: Person, library: Fathom, url: str) -> None:
    assert 'name="password"' in httpx.get(f"{url}/login").text
    wrong = sign_in(url, "anna", "not her password")
    assert wrong.status_code == 403
    assert "set-cookie" not in wrong.headers
    assert "Name or password is wrong" in wrong.text
    assert sign_in(url, "nobody", PASSWORD).text == wrong.text
    assert sign_in(url, "anna", PASSWORD, Origin="http://evil.example").status_code == 403
    assert sign_in(url, "anna", PASSWORD, Origin="null").status_code == 403
    right = sign_in(url, "anna", PASSWORD)
    assert right.status_code == 303
    cookie = right.headers["set-cookie"]
    for part in ("HttpOnly", "SameSite=lax", "Path=/", "Max-Age="):
        assert part in cookie
    with httpx.Client(base_url=url, cookies=right.cookies, timeout=30) as http:
        assert http.get("/v1/documents").json() == []
        assert http.get("/", headers={"Accept": PAGE}).status_code == 404  # the page is not mounted
        # a page elsewhere may send the cookie along, and gets nothing for it
        forged = http.delete("/v1/documents/1", headers={"Origin": "http://evil.example"})
        assert forged.status_code == 403
        secret = right.cookies[COOKIE]
        http.post("/logout")
        again = httpx.get(f"{url}/v1/documents", cookies={COOKIE: secret})
        assert again.status_code == 401
    for end in ("password", "remove"):
        open_cookies = sign_in(url, "anna", PASSWORD).cookies
        assert httpx.get(f"{url}/v1/documents", cookies=open_cookies).status_code == 200
        if end == "password":
            library.accounts.set_password("anna", "another long one")
            library.accounts.set_password("anna", PASSWORD)
        else:
            library.remove_account("anna")
        assert httpx.get(f"{url}/v1/documents", cookies=open_cookies).status_code == 401
    assert anna.http.get("/v1/documents").status_code == 401  # the key went with her


def test_wrong_passwords_are_slowed_down(
    anna: Person, library: Fathom, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rag.store.accounts.AccountStore.password_is_right",
        lambda self, name, password: password == PASSWORD,
    )
    statuses = [sign_in(url, "anna", f"guess {n}").status_code for n in range(12)]
    assert statuses == [403] * 10 + [429] * 2
    assert sign_in(url, "anna", PASSWORD).status_code == 429  # not even with the right one
    assert 'fathom_refused_total{reason="sign-in rate"} 3.0' in anna.http.get("/metrics").text
    assert anna.http.get("/v1/documents").status_code == 200  # who is in stays in


def test_a_body_that_is_too_large_is_refused(anna: Person) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 2**20

    declared = anna.http.post("/v1/questions", content=b" " * (33 * 2**20))
    assert declared.status_code == 413
    assert anna.http.post("/v1/questions", content=endless()).status_code == 413
    assert anna.http.get("/v1/documents").status_code == 200


# ---- two people --------------------------------------------------------------------------------


def test_nobody_gets_anything_of_another(anna: Person, ben: Person) -> None:
    own = [ben.upload(f"handbook-{n}.md", f"{HANDBOOK}\n{n}")["id"] for n in range(5)]
    hers = anna.upload("secret-name.md", SECRET)
    answer = anna.http.post("/v1/questions", json={"question": "Where is the zolothurn?"}).json()
    number, receipt = hers["id"], answer["receipt"]["id"]
    unknown = number + 1000
    for method, path in (
        ("GET", "/v1/documents/{}"),
        ("GET", "/v1/documents/{}/text"),
        ("DELETE", "/v1/documents/{}"),
        ("GET", "/documents/{}/pages/1.png"),
        ("GET", "/documents/{}/pages/1/boxes?start=0&end=5"),
    ):
        theirs = ben.http.request(method, path.format(number))
        nobodys = ben.http.request(method, path.format(unknown))
        assert theirs.status_code == nobodys.status_code == 404
        # what is another's is not told apart from what is not there
        assert theirs.text.replace(str(number), "N") == nobodys.text.replace(str(unknown), "N")
    assert ben.http.get(f"/v1/receipts/{receipt}").status_code == 404
    for documents in ([number], ["secret-name.md"], ["upload:secret-name.md"]):
        asked = {"question": "Where?", "documents": documents}
        assert ben.http.post("/v1/questions", json=asked).status_code == 404
        with pytest.raises(APIStatusError) as caught:
            ben.openai.chat.completions.create(
                model="fathom",
                messages=[{"role": "user", "content": "Where?"}],
                extra_body={"fathom": {"documents": documents}},
            )
        assert caught.value.status_code == 404
    assert [d["id"] for d in ben.http.get("/v1/documents").json()] == own
    everything = ben.http.post("/v1/questions", json={"question": "Where is the zolothurn?"})
    assert "bollard" not in everything.text
    assert "zolothurn" in anna.http.get(f"/v1/documents/{number}/text").text
    assert anna.http.get(f"/v1/receipts/{receipt}").json() == answer
    same = ben.http.post("/v1/documents", files=[("files", ("mine.md", SECRET))])
    assert same.json()[0]["outcome"] == "added"
    assert "secret" not in same.text


def test_thirty_requests_at_once_are_answered_to_whom_they_belong(
    anna: Person, ben: Person
) -> None:
    documents = {
        "anna": anna.upload("a.md", HANDBOOK)["id"],
        "ben": ben.upload("b.md", HANDBOOK.replace("35", "53"))["id"],
    }
    asked = {"question": QUESTION, "route": "retrieval"}

    def ask(person: Person) -> tuple[str, httpx.Response]:
        return person.name, person.http.post("/v1/questions", json=asked)

    with ThreadPoolExecutor(31) as pool:
        answers = [pool.submit(ask, anna if n % 3 else ben) for n in range(30)]
        health = pool.submit(httpx.get, f"{anna.url}/healthz", timeout=30)
        assert health.result().status_code == 200  # those who wait keep nobody out
        for done in answers:
            name, answer = done.result()
            assert answer.status_code == 200, answer.text
            quotes = " ".join(c["quote"] for c in answer.json()["citations"])
            assert {c["document"] for c in answer.json()["citations"]} <= {documents[name]}
            assert ("53" if name == "anna" else "35") not in quotes
    counts = anna.http.get("/metrics").text
    assert 'fathom_answers_total{mode="written",route="retrieval"} 30.0' in counts
    assert "fathom_questions_waiting 0.0" in counts


# ---- documents ---------------------------------------------------------------------------------


def test_documents_come_are_read_and_go(anna: Person) -> None:
    several = anna.http.post(
        "/v1/documents",
        files=[("files", ("a.md", HANDBOOK)), ("files", ("../../b.txt", SECRET))],
        data={"collection": "harbour"},
    )
    assert several.status_code == 201
    assert [o["outcome"] for o in several.json()] == ["added", "added"]
    assert [o["document"]["title"] for o in several.json()] == ["a.md", "b.txt"]
    assert anna.http.get("/v1/collections").json() == [{"name": "harbour", "num_documents": 2}]
    listed = anna.http.get("/v1/documents", params={"collection": "harbour"}).json()
    assert len(listed) == 2
    assert "source" not in listed[0]
    part = anna.http.get(f"/v1/documents/{listed[0]['id']}/text?start=2&end=9").json()
    for beyond in ("start=9&end=2", "start=99999"):
        refused = anna.http.get(f"/v1/documents/{listed[0]['id']}/text?{beyond}")
        assert refused.status_code == 422
        assert "lies beyond the end" in refused.json()["error"]["message"]
    assert part["text"] == HANDBOOK[2:9]
    mixed = anna.http.post(
        "/v1/documents",
        files=[("files", ("c.txt", "Good words")), ("files", ("d.pdf", b"no pdf"))],
    )
    assert mixed.status_code == 207
    assert [o["outcome"] for o in mixed.json()] == ["added", "failed"]
    bad = anna.http.post("/v1/documents", files=[("files", ("d.pdf", b"no pdf"))])
    assert bad.status_code == 422
    assert "not a readable PDF" in bad.json()["error"]["message"]
    assert anna.http.delete(f"/v1/documents/{listed[0]['id']}").status_code == 204
    assert anna.http.get(f"/v1/documents/{listed[0]['id']}").status_code == 404


def test_uploads_leave_nothing_behind(anna: Person, library: Fathom) -> None:
    anna.upload("a.md", HANDBOOK)
    anna.http.post("/v1/documents", files=[("files", ("d.pdf", b"no pdf"))])
    assert list((library.settings.home / "tmp").rglob("*")) == []


def test_a_page_is_drawn_with_the_place_of_a_quotation(
    anna: Person, ben: Person, tmp_path: Path
) -> None:
    first = pdf_line("The quay has twelve berths.") + pdf_line("Berth seven is free.", y=600)
    path = write_pdf(tmp_path / "harbour.pdf", [first, pdf_line("The fee is 35 crowns.", y=100)])
    number = anna.upload("harbour.pdf", path.read_bytes())["id"]
    text = anna.http.get(f"/v1/documents/{number}/text").json()["text"]
    for page, quote in ((1, "twelve berths"), (1, "seven is free"), (2, "35 crowns.")):
        start = text.index(quote)
        where = f"/documents/{number}/pages/{page}"
        png = anna.http.get(f"{where}.png?scale=1")
        assert png.headers["content-type"] == "image/png"
        assert "private" in png.headers["cache-control"]
        picture = np.asarray(Image.open(io.BytesIO(png.content)).convert("L"))
        assert picture.shape == (792, 612)
        (box,) = anna.http.get(
            f"{where}/boxes", params={"start": start, "end": start + len(quote)}
        ).json()["boxes"]
        left, right = int(box[0] * 612), int(box[2] * 612)
        top, bottom = int(box[1] * 792), int(box[3] * 792)
        assert picture[top:bottom, left:right].min() < 100
        assert picture[top:bottom, right + 60 : right + 200].min() == 255
        assert picture[top - 30 : top - 3].min() == 255
        assert ben.http.get(f"{where}.png").status_code == 404
    across = anna.http.get(
        f"/documents/{number}/pages/1/boxes", params={"start": 0, "end": len(text)}
    )
    assert len(across.json()["boxes"]) == 2
    assert anna.http.get(f"/documents/{number}/pages/3.png").status_code == 404
    assert anna.http.get(f"/documents/{number}/pages/1.png?scale=9").status_code == 422
    note = anna.upload("note.txt", SECRET)["id"]
    assert anna.http.get(f"/documents/{note}/pages/1.png").status_code == 404


def test_a_turned_page_has_its_boxes_where_its_words_are(anna: Person, tmp_path: Path) -> None:
    path = write_pdf(tmp_path / "turned.pdf", [pdf_line("Twelve berths.", x=90, y=650)])
    turned = path.read_bytes().replace(
        b"/MediaBox [0 0 612 792]", b"/Rotate 90 /MediaBox [0 0 612 792]"
    )
    number = anna.upload("turned.pdf", turned)["id"]
    where = f"/documents/{number}/pages/1"
    picture = Image.open(io.BytesIO(anna.http.get(f"{where}.png?scale=1").content)).convert("L")
    assert picture.size == (792, 612)
    boxes = anna.http.get(f"{where}/boxes", params={"start": 0, "end": 14}).json()["boxes"]
    dark = picture.point(lambda level: 255 if level < 128 else 0).getbbox()
    assert dark is not None
    left, top = min(b[0] for b in boxes) * 792, min(b[1] for b in boxes) * 612
    right, bottom = max(b[2] for b in boxes) * 792, max(b[3] for b in boxes) * 612
    assert left <= dark[0] + 1
    assert top <= dark[1] + 1
    assert right >= dark[2] - 1
    assert bottom >= dark[3] - 1
    assert (right - left) * (bottom - top) < 792 * 612 / 20


# ---- questions ---------------------------------------------------------------------------------


def test_a_question_is_answered_and_its_receipt_is_kept(anna: Person) -> None:
    number = anna.upload("handbook.md", HANDBOOK)["id"]
    asked = {"question": QUESTION, "documents": [number], "route": "retrieval", "thrift": 0.02}
    answer = anna.http.post("/v1/questions", json=asked).json()
    assert answer["receipt"]["route"] == "retrieval"
    assert answer["receipt"]["thrift"] == 0.02
    assert answer["citations"][0]["quote"] in HANDBOOK
    assert anna.http.get(f"/v1/receipts/{answer['receipt']['id']}").json() == answer
    with anna.http.stream("POST", "/v1/questions", json={**asked, "stream": True}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", stream.read().decode())
    assert events[0][0] == "route"
    assert events[-1][0] == "answer"
    assert json.loads(events[-1][1])["answer"] == answer["answer"]
    wrongs: list[dict[str, Any]] = [{"rout": "full"}, {"route": "guess"}, {"thrift": 2}]
    wrongs += [{"question": ""}, {"question": " ?! "}, {"question": "a" * 20_001}]
    for wrong in ({}, *({**asked, **change} for change in wrongs)):
        refused = anna.http.post("/v1/questions", json=wrong)
        assert refused.status_code == 422
        assert refused.json()["error"]["message"]
    assert anna.http.post("/v1/questions", content=b"{").status_code == 422


def test_a_list_of_no_documents_does_not_ask_all_of_them(anna: Person) -> None:
    number = anna.upload("handbook.md", HANDBOOK)["id"]
    refused = anna.http.post("/v1/questions", json={"question": QUESTION, "documents": []})
    assert refused.status_code == 422
    assert refused.json()["error"]["type"] == "QuestionError"
    anna.http.post("/v1/documents", files=[("files", ("a.md", "A."))], data={"collection": "gone"})
    asked = {"question": QUESTION, "collection": "gone", "route": "retrieval"}
    assert anna.http.post("/v1/questions", json=asked).status_code == 200
    batch = {"rows": [{"question": QUESTION}], "documents": [], "start": False}
    assert anna.http.post("/v1/batches", json=batch).status_code == 409
    assert anna.http.post("/v1/batches", json={**batch, "documents": [number]}).status_code == 201


def test_an_empty_library_says_so(anna: Person) -> None:
    refused = anna.http.post("/v1/questions", json={"question": QUESTION})
    assert refused.status_code == 409
    assert "no document" in refused.json()["error"]["message"]
    with anna.http.stream(
        "POST", "/v1/questions", json={"question": QUESTION, "stream": True}
    ) as stream:
        assert "event: error" in stream.read().decode()


def test_a_fault_of_ours_is_a_number_and_no_traceback(
    anna: Person, library: Fathom, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    anna.upload("handbook.md", HANDBOOK)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("inner words")

    monkeypatch.setattr("rag.answering.service.AnsweringService.stream", fail)
    monkeypatch.setattr("rag.store.documents.DocumentStore.collections", fail)
    for answer in (
        anna.http.post("/v1/questions", json={"question": QUESTION}),
        anna.http.get("/v1/collections"),
    ):
        assert answer.status_code == 500
        assert "inner words" not in answer.text
        (number,) = re.findall(r"error ([0-9a-f]{8})", answer.text)
        assert number in caplog.text
    with anna.http.stream(
        "POST", "/v1/questions", json={"question": QUESTION, "stream": True}
    ) as stream:
        told = stream.read().decode()
    assert "event: error" in told
    assert "inner words" not in told
    assert 'fathom_errors_total{kind="RuntimeError"} 2.0' in anna.http.get("/metrics").text


# ---- whatever the description allows ------------------------------------------------------------


def test_whatever_is_sent_gets_an_answer_that_the_description_names(
    anna: Person, tmp_path: Path
) -> None:
    """Requests made up from the OpenAPI description, right and wrong: never a fault of ours."""
    anna.upload("handbook.md", HANDBOOK)
    path = write_pdf(tmp_path / "harbour.pdf", [pdf_line("The quay has twelve berths.")])
    anna.upload("harbour.pdf", path.read_bytes())
    schema = schemathesis.openapi.from_dict(anna.http.get("/openapi.json").json())
    tried = []
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=8,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def try_it(case: schemathesis.Case[Any]) -> None:
            answer = case.call(base_url=anna.url, headers={"Authorization": f"Bearer {anna.key}"})
            case.validate_response(
                answer,
                checks=[
                    not_a_server_error,
                    status_code_conformance,
                    content_type_conformance,
                    response_schema_conformance,
                ],
            )

        try_it()
        tried.append(operation.label)
    assert len(tried) >= 13
    assert anna.http.get("/metrics").text.count("fathom_errors_total{") == 0


# ---- OpenAI's client ---------------------------------------------------------------------------


def test_openais_client_asks_and_gets_citations(anna: Person) -> None:
    number = anna.upload("handbook.md", HANDBOOK)["id"]
    names = [model.id for model in anna.openai.models.list()]
    assert names == ["fathom", "tiny-llama"]
    given = anna.openai.chat.completions.create(
        model="fathom",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        ],
        temperature=0,
        max_tokens=5,
        extra_body={"fathom": {"documents": [number], "route": "retrieval", "thrift": 0.5}},
    )
    told = given.model_extra["fathom"] if given.model_extra else {}
    assert given.choices[0].message.content
    assert told["receipt"]["route"] == "retrieval"
    assert told["receipt"]["thrift"] == 0.5
    assert told["citations"][0]["quote"] in HANDBOOK
    assert told["messages_not_read"] == 1
    assert told["fields_not_used"] == ["max_tokens", "temperature"]
    assert given.usage is not None
    assert given.usage.prompt_tokens == told["receipt"]["prompt_tokens"]
    assert anna.http.get(f"/v1/receipts/{told['receipt']['id']}").status_code == 200


def test_a_follow_up_is_asked_with_what_came_before(anna: Person) -> None:
    anna.upload("handbook.md", HANDBOOK)
    chat: list[Any] = [
        {"role": "user", "content": "Where is the north beacon?"},
        {"role": "assistant", "content": "North of the quay."},
        {"role": "user", "content": "What colour does it flash?"},
    ]
    given = anna.openai.chat.completions.create(model="fathom", messages=chat)
    told = given.model_extra["fathom"] if given.model_extra else {}
    assert told["messages_not_read"] == 0
    assert "north beacon" in told["receipt"]["standalone_question"]
    first = anna.http.post("/v1/questions", json={"question": "Where is the north beacon?"}).json()
    asked = {"question": "What colour does it flash?", "after": first["receipt"]["id"]}
    second = anna.http.post("/v1/questions", json=asked).json()
    assert "north beacon" in second["receipt"]["standalone_question"]
    unknown = anna.http.post("/v1/questions", json={**asked, "after": "no receipt"})
    assert unknown.status_code == 404


def test_openais_client_streams_the_checked_answer(anna: Person) -> None:
    anna.upload("handbook.md", HANDBOOK)
    whole = anna.openai.chat.completions.create(
        model="tiny-llama", messages=[{"role": "user", "content": QUESTION}]
    )
    stream = anna.openai.chat.completions.create(
        model="fathom",
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in pieces) > 3
    told = [c.model_extra["fathom"] for c in chunks if c.model_extra and "fathom" in c.model_extra]
    assert any("draft" in event for event in told)
    assert told[-1]["receipt"]["id"]
    assert chunks[-1].usage is not None
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "gpt-5"}, 404),
        ({"n": 2}, 400),
        ({"messages": [{"role": "user", "content": " "}]}, 400),
        ({"messages": [{"role": "system", "content": "x"}]}, 400),
        ({"messages": [{"role": "user", "content": "?"}]}, 422),
        ({"messages": [{"role": "user", "content": "What is the fee? " * 2_000}]}, 422),
        ({"extra_body": {"fathom": {"documents": []}}}, 422),
        ({"extra_body": {"fathom": {"document": [1]}}}, 422),
        ({"extra_body": {"fathom": {"collection": "none"}}}, 404),
    ],
)
def test_what_cannot_be_done_is_said(anna: Person, change: dict[str, Any], status: int) -> None:
    anna.upload("handbook.md", HANDBOOK)
    messages = [{"role": "user", "content": QUESTION}]
    request: dict[str, Any] = {"model": "fathom", "messages": messages, **change}
    with pytest.raises(APIStatusError) as caught:
        anna.openai.chat.completions.create(**request)
    assert caught.value.status_code == status


def test_openais_client_without_a_key_is_refused(anna: Person) -> None:
    with (
        OpenAI(base_url=f"{anna.url}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(AuthenticationError),
    ):
        other.models.list()
