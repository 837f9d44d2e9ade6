"""The library: what is there, and deleting it."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from rag.errors import FathomError
from ui.formatting import error_html, plain_html
from ui.library import Library

_COLUMNS = ["no.", "title", "version", "pages", "chunks", "characters", "added", "warnings"]
_WIDTHS: list[str | int] = ["5%", "27%", "8%", "7%", "8%", "11%", "11%", "23%"]


def build_library(library_of: Callable[[gr.Request], Library], tab: gr.Tab) -> None:
    """Lay out the tab inside the running Blocks and wire it."""
    table = gr.Dataframe(
        headers=_COLUMNS,
        column_widths=_WIDTHS,
        interactive=False,
        wrap=True,
        label="Documents",
    )
    with gr.Row(elem_id="deleting"):
        doomed = gr.Dropdown([], label="Document to delete", value=None, scale=2)
        sure = gr.Checkbox(
            label="Delete it for good: text, vectors, file, and its words in past answers", scale=2
        )
        remove = gr.Button("Delete", variant="stop", scale=0, min_width=120)
    note = gr.HTML()

    def listing(chosen: int | None, request: gr.Request) -> tuple[list[list[Any]], Any]:
        documents = library_of(request).documents()
        rows = [
            [
                *(d.id, d.title, d.version, d.num_pages or "", f"{d.num_chunks:,}"),
                *(f"{d.num_chars:,}", d.created_at[:10], "; ".join(d.warnings)),
            ]
            for d in documents
        ]
        choices = [(f"{d.id} {d.title}", d.id) for d in documents]
        still_there = next((d.id for d in documents if d.id == chosen), None)
        return rows, gr.update(choices=choices, value=still_there)

    def delete(document_id: int | None, confirmed: bool, request: gr.Request) -> tuple[str, Any]:
        if document_id is None:
            return error_html("no document is chosen", "choose one in the list"), False
        if not confirmed:
            return error_html(
                "deleting is not confirmed", "tick the box beside it first"
            ), confirmed
        try:
            library_of(request).delete(document_id)
        except FathomError as error:
            return error_html(error.message, error.hint), False
        return plain_html(f"Document {document_id} is deleted."), False

    remove.click(delete, [doomed, sure], [note, sure], api_visibility="private").then(
        listing, [doomed], [table, doomed], api_visibility="private"
    )
    tab.select(listing, [doomed], [table, doomed], api_visibility="private", show_progress="hidden")
