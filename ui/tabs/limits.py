"""The limits: what one model can read in given memory, as gates, bytes and curves."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from rag.errors import FathomError
from rag.lm.kv_bytes import KVDtype
from rag.lm.spec import ModelSpec
from rag.routing.model_plan import ModelPlan, plan_model
from rag.store.calibrations import CalibrationStore, DepthCell, EffectiveLength
from ui.answer_html import bar_html, gates_html
from ui.assembly import Fathom
from ui.formatting import amount, error_html, plain_html, plural
from ui.library import Library
from ui.tabs.parts import html_view, thrift_slider, unexpected
from ui.verbs.model_plan import ranges_text

_GIB = 2**30
_OWN = ("the model's own", "")
_POINTS = 120  # of the prefill curve
_LONGEST = 262_144
_MOST_QUESTIONS = 1_000  # the last ones, that thrift is reckoned from


def build_limits(fathom: Fathom, blocks: gr.Blocks, tab: gr.Tab, thrift_of_chat: gr.Slider) -> None:
    """Lay out the tab inside the running Blocks and wire it.

    Of what has an owner it shows only what thrift would do with his own questions; its dial is that
    of the chat: whichever is moved, the other follows, and the browser keeps it for the next page.
    """
    with gr.Row(elem_id="limits"):
        with gr.Column(elem_id="dials", min_width=0):
            model = gr.Dropdown([], label="Model", allow_custom_value=True, filterable=True)
            memory = gr.Number(
                label="Device memory, GiB", info="What is free here, until you change it", minimum=0
            )
            kv_dtype = gr.Dropdown(
                [_OWN, *((dtype.value, dtype.value) for dtype in KVDtype)],
                value="",
                label="KV precision",
            )
            tokens = gr.Slider(
                1_024, _LONGEST, 32_768, step=1_024, label="Context, tokens", elem_id="tokens"
            )
            thrift = thrift_slider(fathom.settings.thrift, "thrift-limits")
        with gr.Column(elem_id="planned", min_width=0):
            plan = html_view(elem_classes="plan", value='<p class="status">Counting …</p>')
            spent = html_view(elem_classes="plan spent")

    def first(chosen: str | None, gib: float | None) -> tuple[Any, Any]:
        names = _model_names(fathom)
        return (
            gr.update(choices=names) if chosen else gr.update(choices=names, value=names[0]),
            gr.skip() if gib else round(_free_bytes(fathom) / _GIB, 1),
        )

    def show(name: str, gib: float | None, dtype: str, num_tokens: float) -> str:
        try:
            device_bytes = int((gib or 0) * _GIB)
            return _plan_html(fathom, name, device_bytes, dtype, int(num_tokens))
        except FathomError as error:
            return error_html(error.message, error.hint)
        except Exception:
            return unexpected()

    def reckon(thrifty: float, request: gr.Request) -> str:
        try:
            return thrift_html(fathom.for_user(request), thrifty)
        except Exception:
            return unexpected()

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    dials = [model, memory, kv_dtype, tokens]
    # whoever comes here comes from the chat, whose dial is then the one that was moved last
    tab.select(reckon, [thrift_of_chat], [spent], **quiet)
    tab.select(first, [model, memory], [model, memory], **quiet).then(show, dials, [plan], **quiet)
    thrift.release(reckon, [thrift], [spent], **quiet)
    gr.on(
        [model.input, memory.submit, memory.blur, kv_dtype.input, tokens.release],
        show,
        dials,
        [plan],
        trigger_mode="always_last",
        concurrency_limit=1,
        **quiet,
    )
    for moved, other in ((thrift, thrift_of_chat), (thrift_of_chat, thrift)):
        kept = "(thrift) => fathom.keep('thrift', thrift)"
        moved.input(None, [moved], [other], js=kept, api_visibility="private")
    # In the page alone: nothing of it is on its way while somebody moves the dial.
    blocks.load(
        None,
        None,
        [thrift, thrift_of_chat],
        js="() => Array(2).fill("
        f"fathom.kept('thrift', {fathom.settings.thrift}, {thrift.maximum}))",
        api_visibility="private",
    )


def _plan_html(
    fathom: Fathom, name: str, device_bytes: int, kv_dtype_name: str, tokens: int
) -> str:
    """Return the plan of a model as gates, bars and two curves."""
    from rag.lm.engine import name_with_cache
    from rag.lm.model_facts import find_model_facts
    from ui.plots import model_plan_figure, prefill_figure, to_svg

    settings = fathom.settings
    kv_dtype = KVDtype(kv_dtype_name) if kv_dtype_name else None
    facts = find_model_facts(name, settings)
    longest = 2 * max(tokens, 16_384)
    lengths = sorted({max(2, longest * i // _POINTS) for i in range(1, _POINTS + 1)} | {tokens})
    seconds = _prefill_seconds(fathom, facts.name, facts.spec, lengths)
    cached = name_with_cache(facts.name, kv_dtype) if kv_dtype is KVDtype.Q8_0 else facts.name
    effective = CalibrationStore(fathom.database).effective_length_of(cached)
    plan = plan_model(
        facts.spec,
        tokens,
        model=facts.name,
        source=facts.source,
        file_bytes=facts.file_bytes,
        quantization=facts.quantization,
        device_bytes=device_bytes,
        reserve_bytes=settings.kv_reserve_bytes,
        kv_dtype=kv_dtype,
        max_context_tokens=settings.max_context_tokens,
        prefill_deadline_seconds=settings.prefill_deadline_seconds,
        predicted_prefill_seconds=seconds.get(tokens),
        effective_tokens=effective.tokens if effective else None,
    )
    memory = to_svg(model_plan_figure(plan, facts.spec, kv_dtype=kv_dtype))
    shown = (
        f"{_verdict(plan)}<h2>Gates for {plan.tokens:,} tokens</h2>{gates_html(plan.gates)}"
        f"<h2>Memory</h2>{_memory(plan)}"
        f"{_plot(memory, f'Cache bytes of {plan.model} over length, with the limits')}"
        "<h2>Prefill</h2>"
    )
    if seconds:
        curve = prefill_figure(seconds, tokens, settings.prefill_deadline_seconds)
        shown += _plot(to_svg(curve), f"Predicted prefill seconds of {plan.model} over length")
    else:
        shown += (
            '<p class="none">Its speed was not measured on this machine: ask it something once, or'
            " run <code>fathom plan --measure</code>.</p>"
        )
    shown += f'<h2>Effective length</h2><p class="of">{plain_html(ranges_text(plan.ranges))}</p>'
    return shown + calibration_html(effective, facts.name)


def thrift_html(library: Library, thrift: float) -> str:
    """Return what a thrift leads to, reckoned from the questions of this library so far."""
    from eval.thrift import thrift_curve, thrift_point, weighed
    from ui.plots import thrift_figure, to_svg

    receipts = library.receipts.newest(_MOST_QUESTIONS)
    asked = weighed(receipts)
    head = "<h2>Thrift</h2>"
    if not asked:
        several = f"None of your {plural(len(receipts), 'question')} so far was" if receipts else ""
        return (
            f'{head}<p class="none">{several or "No question so far was"} one that thrift decides:'
            " answered in the model&#39;s own words, where both routes were open. Ask some that"
            " compare or combine things; what each route would cost, and how likely it would be"
            " right, is then shown here.</p>"
        )
    budget = library.settings.retrieval_tokens
    curve = thrift_curve(asked, budget)
    here = thrift_point(asked, thrift, budget)
    likely = {point.cost_tokens for point in curve}
    words = (
        f'<p class="fits"><b>At {thrift:g}</b> a question takes'
        f" <b>{here.cost_tokens:,.0f} prompt tokens</b> and is right with a probability of"
        f" <b>{here.probability:.0%}</b>; {here.full_share:.0%} read everything.</p>"
        f'<p class="none">Reckoned from {plural(len(asked), "question")} of yours, by what the'
        " router thought each route worth; no answer was judged. Not among them: quotations,"
        " counts, and what needs everything read.</p>"
    )
    if len(likely) == 1:
        return f'{head}{words}<p class="none">No thrift changes the route of any of them.</p>'
    said = f"Probability of being right over prompt tokens, thrift {curve[-1].thrift:g} to 0"
    return head + words + _plot(to_svg(thrift_figure(curve, here)), said)


def calibration_html(found: EffectiveLength | None, model: str) -> str:
    """Return how well a model was measured to use prompts, by their length and the fact's depth."""
    from ui.plots import depths_figure, effective_length_figure, to_svg
    from ui.verbs.calibration import verdict

    if found is None:
        return (
            f'<p class="none">{plain_html(model)} is not calibrated yet on this machine: run'
            " <code>fathom calibrate --quick</code>, which takes under five minutes.</p>"
        )
    words = f"Accuracy of {found.model} over prompt length, as measured here"
    shown = (
        f"<p>{plain_html(verdict(found))}.</p>"
        f"{_plot(to_svg(effective_length_figure(found)), words)}<h2>By depth</h2>"
    )
    if not found.cells:
        return shown + (
            '<p class="none">Depths were not kept when this was measured: run <code>fathom'
            " calibrate --quick</code> again; what is measured already is not asked again.</p>"
        )
    words = f"Lookups right by length of the prompt and depth of the fact, {found.model}"
    return shown + _plot(to_svg(depths_figure(found.cells)), words) + _depths_table(found.cells)


def _depths_table(cells: Sequence[DepthCell]) -> str:
    """Return the heatmap as a table, for who listens or copies."""
    lengths = sorted({cell.tokens for cell in cells})
    at = {(cell.tokens, cell.depth_from): cell for cell in cells}
    ends = {cell.depth_from: cell.depth_to for cell in cells}
    head = "".join(f'<th scope="col">{tokens:,} tokens</th>' for tokens in lengths)
    rows = ""
    for depth in sorted(ends):
        found = [at.get((tokens, depth)) for tokens in lengths]
        row = "".join(
            f"<td>{cell.correct:.0%} of {cell.num_questions}</td>" if cell else "<td>not asked</td>"
            for cell in found
        )
        rows += f'<tr><th scope="row">{depth:.0%} to {ends[depth]:.0%}</th>{row}</tr>'
    return (
        '<details class="numbers"><summary>As a table</summary><div class="wide" tabindex="0">'
        f'<table class="figures"><thead><tr><th scope="col">Depth</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _verdict(plan: ModelPlan) -> str:
    longest = "without end" if plan.max_tokens is None else f"{plan.max_tokens:,} tokens"
    fits = "fits" if plan.fits else "does not fit"
    return (
        f'<p class="fits {"passed" if plan.fits else "failed"}"><b>{plan.tokens:,} tokens'
        f" {fits}.</b> The longest context that {plain_html(plan.model)} can read here is"
        f" <b>{longest}</b>; {plan.num_sequences:,} caches of this length fit at once.</p>"
        f'<p class="none">{plain_html(plan.source)}</p>'
    )


def _memory(plan: ModelPlan) -> str:
    """Return what takes the memory, each kind of layer for itself, as bars of one scale."""
    rows = [
        ("weights", plan.weights_bytes),
        *((f"cache, {kind} layers", size) for kind, size in plan.kv_bytes_by_kind.items() if size),
        ("peak beside it", plan.peak_bytes),
        ("reserve", plan.reserve_bytes),
    ]
    items = "".join(
        f'<li><span class="name">{plain_html(name)}</span>'
        f"{bar_html(size, plan.device_bytes, failed=size > plan.device_bytes)}"
        f'<span class="numbers">{plain_html(amount(size, "bytes"))}</span></li>'
        for name, size in rows
    )
    return (
        f'<p class="of">Of {amount(plan.device_bytes, "bytes")}; cache in {plan.kv_dtype}</p>'
        f'<ul class="gates memory">{items}</ul>'
    )


def _plot(svg: str, words: str) -> str:
    return f'<figure class="plot" role="img" aria-label="{plain_html(words)}">{svg}</figure>'


def _prefill_seconds(
    fathom: Fathom, name: str, spec: ModelSpec, lengths: Sequence[int]
) -> dict[int, float]:
    """Return the predicted seconds of each length; empty where no rate was measured here."""
    from rag.lm.device import choose_device
    from rag.lm.prefill_rate import PrefillClock

    clock = PrefillClock(
        spec,
        model_name=name,
        device_type=choose_device(fathom.settings).type,
        calibrations=CalibrationStore(fathom.database),
    )
    return {tokens: clock.seconds(tokens) for tokens in lengths} if clock.is_set else {}


def _model_names(fathom: Fathom) -> list[str]:
    """Return the model in use, then those fetched, then those known by their config alone."""
    from rag.lm.catalog import fetched_models, load_catalog, resolve_model_name
    from rag.lm.known_models import known_models

    catalog = load_catalog()
    fetched = [m.name for m in fetched_models(fathom.settings) if m.name in catalog]
    readers = [name for name in fetched if catalog[name].use != "embedder"]
    in_use = resolve_model_name(fathom.settings.model, fathom.settings)
    return list(dict.fromkeys([in_use, *readers, *known_models()]))


def _free_bytes(fathom: Fathom) -> int:
    from rag.lm.device import choose_device, free_device_bytes

    return free_device_bytes(choose_device(fathom.settings).type)
