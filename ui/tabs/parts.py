"""What the tabs share: whose library it is, components that draw HTML, and errors at the edge."""

import logging
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ui.formatting import error_html
from ui.library import Library

logger = logging.getLogger(__name__)

# Every handler asks for its library with the request, which says who is asking.
LibraryOf = Callable[[gr.Request], Library]

_MOST_THRIFT = 0.05  # a point of accuracy is worth 200 tokens; the settings may ask for more
_THRIFT_STEP = 0.0005

_TABLE_FRAME = """<p class="label-of">{label}</p>
<label class="drop"><input type="file" name="table" accept="{kinds}"
 aria-label="Table of questions" class="unseen"><span>Drop a table here, or <u>choose one</u>
</span></label>{about}<div class="note" aria-live="polite"></div>"""

# What is shown while there is more of it is found by searching.
MOST_ROWS = 200


def html_view(events: Sequence[str] = (), *, kind: str = "show", **options: Any) -> gr.HTML:  # noqa: ANN401 - of gr.HTML
    """Return a component that draws the HTML it is given; see `page.js`.

    Args:
        events: what its `data-event` buttons may tell; each is an attribute to listen on.
        kind: show (the value is HTML), evidence, or conversation (the value is a dict).
        options: of gr.HTML.
    """
    frame = (
        '<div class="log" role="log" tabindex="0" aria-label="Conversation"></div>'
        if kind == "conversation"
        else '<div class="shown"></div>'
    )
    return gr.HTML(
        html_template=frame,
        apply_default_css=False,
        js_on_load=f"fathom.{kind}(element, props, trigger, watch, {list(events)})",
        **options,
    )


def table_view(
    address: str, event: str, *, label: str, kinds: Sequence[str], about: str, elem_id: str
) -> gr.HTML:
    """Return a place to drop a table of questions on, which the page sends on.

    Args:
        address: where to; the answer says what was `made` of the table, "" if nothing, in `html`.
        event: tells of what was made, as an attribute of the same name.
        label: what it is called.
        kinds: suffixes of the files that can be chosen.
        about: HTML below it.
        elem_id: its id.
    """
    return gr.HTML(
        html_template=_TABLE_FRAME.format(label=label, kinds=",".join(kinds), about=about),
        apply_default_css=False,
        js_on_load=f'fathom.table(element, "{address}",'
        f' (made) => trigger("{event}", {{ {event}: made }}))',
        elem_id=elem_id,
        elem_classes=["adds", "ingest-note"],
    )


def download_view() -> gr.HTML:
    """Return a component that saves what it is given: JSON of {name, type, text}."""
    return gr.HTML(
        html_template="<span></span>",
        js_on_load="fathom.download(props, watch)",
        elem_classes="nothing",
    )


def say_stopping(stop: gr.Button) -> None:
    """Let a button that stops say so at once; `stop_shown` takes the word back."""
    stop.click(None, None, [stop], js="() => 'Stopping'", api_visibility="private")


def stop_shown(is_there: bool) -> Any:  # noqa: ANN401 - a Gradio update
    """Return the update that shows a button that stops, or hides it."""
    return gr.update(visible=is_there, value="Stop")


def thrift_slider(thrift: float, elem_id: str) -> gr.Slider:
    """Return the dial of thrift, set to that of the settings."""
    return gr.Slider(
        0,
        max(_MOST_THRIFT, thrift),
        thrift,
        step=_THRIFT_STEP,
        precision=4,
        label="Thrift",
        info="Accuracy that 1,000 tokens are worth; 0: whatever it costs",
        elem_id=elem_id,
        buttons=[],
    )


def unexpected() -> str:
    """Log the traceback under an id, and return what a person is told."""
    number = uuid.uuid4().hex[:8]
    logger.exception("unexpected error %s", number)
    return error_html(
        f"something unexpected went wrong (error {number})",
        "the log of `fathom serve` has the details under this number; fathom doctor checks the"
        " library",
    )


def offered(choices: Sequence[tuple[str, int]], chosen: Sequence[int]) -> Any:  # noqa: ANN401 - a Gradio update
    """Return what may be chosen now; what is chosen meanwhile stays, and what is gone goes.

    Args:
        choices: label and id of each.
        chosen: ids, as they were when this was asked for.
    """
    there = {number for _, number in choices}
    still_there = [number for number in chosen if number in there]
    taken_back: dict[str, Any] = {} if still_there == list(chosen) else {"value": still_there}
    return gr.update(choices=list(choices), **taken_back)
