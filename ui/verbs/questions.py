"""Verbs on questions: ask, plan, receipt."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rag.settings import load_settings
from ui.console import (
    CollectionOption,
    Documents,
    Home,
    Json,
    Model,
    RouteOption,
    ThriftOption,
    document_ids,
    err,
    open_fathom,
    out,
    print_json,
)
from ui.formatting import plural

app = typer.Typer()

# Where nobody sees the status change, a longer reading is told once.
_LONG_SECONDS = 60.0


@app.command(
    epilog="Examples: fathom ask 'Who signs?'  |  fathom ask --route full -d 1 'Who signs?' --json"
)
def ask(
    question: Annotated[str, typer.Argument(help="In words.")],
    documents: Documents = None,
    collection: CollectionOption = None,
    route: RouteOption = None,
    thrift: ThriftOption = None,
    after: Annotated[
        str | None,
        typer.Option(help="Receipt of the answer that this question follows: `And who signs it?`"),
    ] = None,
    model: Model = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Answer a question with citations and the receipt of how it was read."""
    from rag.answering.conversation import Turn
    from rag.answering.service import AnswerReady, QuestionRewritten, RouteChosen
    from rag.lm.engine import PrefillProgress, TextPiece
    from ui.formatting import receipt_text
    from ui.reading import Reading

    if not question.strip():
        raise typer.BadParameter("the question is empty")
    fathom = open_fathom(load_settings(home=home, model=model))
    ids = document_ids(fathom, documents, collection)
    history = []
    if after is not None:
        before = fathom.receipts.load(after)
        asked = before.receipt.standalone_question or fathom.receipts.asked(after)[0]
        history.append(Turn(asked, before.answer))
    answer, reading, is_told = None, Reading(), err.is_terminal
    with err.status("loading the model") as status:
        for event in fathom.service().stream(
            question, document_ids=ids, route=route, history=history, thrift=thrift
        ):
            if isinstance(event, QuestionRewritten):
                err.print(f"asked as: {event.question}", markup=False)
            elif isinstance(event, RouteChosen):
                reading = Reading()
                status.update(f"{event.decision.route}: reading {event.read}")
            elif isinstance(event, PrefillProgress):
                now = time.monotonic()
                status.update(reading.words(event, now))
                if not is_told and (reading.seconds_left(event, now) or 0) > _LONG_SECONDS:
                    is_told = True
                    err.print(f"{reading.words(event, now)}; Ctrl+C ends it", markup=False)
            elif isinstance(event, TextPiece):
                status.update("writing")
            elif isinstance(event, AnswerReady):
                answer = event.answer
    assert answer is not None
    if as_json:
        print_json(answer.to_json())
    else:
        out.print(receipt_text(answer), markup=False)


@app.command(
    epilog="Examples: fathom plan  |  fathom plan -d report.pdf --measure --json"
    "  |  fathom plan --model llama-3.1-8b --tokens 131072 --device-memory 24GiB --plot plan.png"
)
def plan(
    question: Annotated[str, typer.Argument(help="A question, if there is one.")] = "",
    documents: Documents = None,
    collection: CollectionOption = None,
    route: RouteOption = None,
    thrift: ThriftOption = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the weights and time a prefill, too.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Plan the model alone for a context of so many tokens."),
    ] = None,
    device_memory: Annotated[
        str | None,
        typer.Option(help="With --tokens: memory to plan for, e.g. 24GiB. Default: what is free."),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(help="With --tokens: the cache's format, e.g. bf16, int8. Default: its own."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --tokens: draw cache and limits over length here.")
    ] = None,
    model: Model = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show which route would be taken and every gate's numbers, without reading a token.

    With --tokens no document is asked about: any model is planned from its config, weights or not.
    """
    settings = load_settings(home=home, model=model)
    if tokens is not None:
        if question or documents or collection or route or measure or thrift is not None:
            raise typer.BadParameter("--tokens plans the model alone, without documents")
        from ui.verbs.model_plan import show_model_plan

        show_model_plan(
            tokens,
            settings,
            device_memory=device_memory,
            kv_dtype=kv_dtype,
            plot=plot,
            as_json=as_json,
        )
        return
    if device_memory or kv_dtype or plot:
        raise typer.BadParameter("--device-memory, --kv-dtype and --plot need --tokens")
    from rag.routing.gates import describe
    from ui.formatting import routes_words
    from ui.verbs.model_plan import ranges_text

    fathom = open_fathom(settings)
    ids = document_ids(fathom, documents, collection)
    service = fathom.service()
    planned = service.plan(
        question, service.documents(ids), route=route, calibrate=measure, thrift=thrift
    )
    decision = planned.decision
    ranges = fathom.context_ranges()
    if as_json:
        print_json(
            {
                "route": decision.route,
                "reason": decision.reason,
                "question_class": decision.question_class,
                "class_reason": decision.class_reason,
                "gates": [gate.to_json() for gate in decision.gates],
                "routes": [asdict(estimate) for estimate in decision.routes],
                "thrift": planned.thrift,
                "document_tokens": planned.document_tokens,
                "prompt_tokens": planned.prompt.num_tokens,
                "kv_dtype": planned.kv_dtype,
                "longest_context_tokens": service.longest_context_tokens(),
                "context_ranges": ranges.to_json() if ranges else None,
                "model": fathom.engine.name,
            }
        )
        return
    out.print(f"{decision.route}: {decision.reason}", markup=False)
    if question:
        out.print(f"question: {decision.question_class}: {decision.class_reason}", markup=False)
    if decision.routes:
        words = routes_words(decision.routes, planned.thrift)
        out.print(f"worth: {words}", markup=False)
    for gate in decision.gates:
        verdict = "passed" if gate.passed else "FAILED"
        cache = f"  ({gate.kv_dtype} cache)" if gate.kv_dtype else ""
        out.print(f"  {gate.route:<10} {verdict}  {describe(gate)}{cache}", markup=False)
    longest = service.longest_context_tokens()
    room = "no end" if longest is None else f"{longest:,} tokens"
    out.print(f"longest context that fits {fathom.engine.name} here: {room}")
    if ranges:
        out.print(ranges_text(ranges), markup=False)


@app.command(epilog="Examples: fathom receipt 1f2e3d4c5b6a  |  fathom receipt ID --json")
def receipt(
    receipt_id: Annotated[str, typer.Argument(help="The id in an answer's receipt.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show a past answer with its receipt."""
    from ui.formatting import receipt_text

    answer = open_fathom(load_settings(home=home)).receipts.load(receipt_id)
    if as_json:
        print_json(answer.to_json())
    else:
        out.print(receipt_text(answer), markup=False)


@app.command(epilog="Examples: fathom replay 1f2e3d4c5b6a  |  fathom replay ID --json")
def replay(
    receipt_id: Annotated[str, typer.Argument(help="The id in an answer's receipt.")],
    model: Model = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Ask a past question again, of the same document versions, and say what differs.

    With the receipt's own model unless --model names another; exit code 1 if the text differs.
    """
    from rag.answering.replay import replay as ask_again

    settings = load_settings(home=home, model=model)
    if model is None:
        past = open_fathom(settings).receipts.load(receipt_id)
        settings = load_settings(home=home, model=past.receipt.model)
    fathom = open_fathom(settings)
    with err.status("asking again"):
        found = ask_again(receipt_id, fathom.receipts, fathom.service())
    if as_json:
        print_json(found.to_json())
    elif found.same_text:
        out.print(f"the same text, receipt {found.now.receipt.id}", markup=False)
    for difference in [] if as_json else found.differences:
        out.print(difference, markup=False)
    if not found.same_text:
        raise typer.Exit(1)


@app.command(
    "fit-router",
    epilog="Examples: fathom fit-router --answers -o router.json"
    "  |  fathom fit-router pairs.jsonl -o router.json  |  fathom fit-router --lara sets -o r.json",
)
def fit_router_verb(
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the weights.")],
    pairs: Annotated[
        Path | None, typer.Argument(help="JSON lines, a question that both routes answered each.")
    ] = None,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers", help="Fit from this library: questions asked again by another route."
        ),
    ] = False,
    lara: Annotated[
        Path | None, typer.Option("--lara", help="Fit from LaRA's dev split in this data folder.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Fit the router to questions that both routes answered here; 200 pairs or more.

    FATHOM_ROUTER_WEIGHTS=FILE has answers use them; `fathom bench router --weights FILE` judges.
    A line holds model, document, question, document_tokens, effective_tokens, shares,
    places, question_class, and full and retrieval: how right each route was, 0 to 1.
    """
    from eval.fit_router import fit_router, load_pairs, pairs_from_answers
    from rag.routing.utility import load_weights, save_weights

    if (pairs is not None) + answers + (lara is not None) != 1:
        raise typer.BadParameter("give one of: a file of pairs, --answers, --lara with its folder")
    prior = None if lara is not None else load_weights()  # what LaRA taught is not unlearned
    if lara is not None:
        from eval.bench.router import label_pairs
        from eval.lara import load_lara

        documents, predictions = load_lara(lara)
        dev = {document.id for document in documents if document.split == "dev"}
        labelled = label_pairs(
            [document for document in documents if document.id in dev],
            [prediction for prediction in predictions if prediction.document_id in dev],
        )
        source = "LaRA dev"
    elif answers:
        fathom = open_fathom(load_settings(home=home))
        labelled = pairs_from_answers(fathom.receipts, fathom.service())
        source = "answers of this library"
    else:
        assert pairs is not None
        labelled, source = load_pairs(pairs), pairs.name
    weights = fit_router(
        labelled, fitted_on=f"{source}, {plural(len(labelled), 'pair')}", prior=prior
    )
    save_weights(weights, output)
    if as_json:
        print_json({"pairs": len(labelled), "weights": str(output)})
    else:
        out.print(f"fitted to {plural(len(labelled), 'pair')}: {output}", markup=False)
