"""How the page looks: one theme for light and dark, one style sheet, one script."""

from pathlib import Path

import gradio as gr

CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")


def theme() -> gr.themes.Base:
    """Return the theme: the system's fonts, so that nothing is fetched, and one hue."""
    same_in_both = {
        "block_title_background_fill": "transparent",
        "block_title_text_color": "*body_text_color",
        "block_info_text_color": "*body_text_color_subdued",
        "block_border_width": "0px",
        "block_shadow": "none",
        "block_background_fill": "transparent",
        "block_padding": "0px",
        "input_border_width": "1px",
        "checkbox_border_width": "1px",
        "input_background_fill": "*background_fill_primary",
        "button_secondary_border_color": "*border_color_primary",
    }
    light = {
        "body_background_fill": "#fbfaf8",
        "background_fill_primary": "#ffffff",
        "background_fill_secondary": "#f4f3ef",
        "body_text_color": "#1c1917",
        "body_text_color_subdued": "#57534e",
        "border_color_primary": "#e0ddd7",
        "input_border_color": "#8f8a83",
        "input_placeholder_color": "#6b6560",
        "checkbox_border_color": "#78716c",
        "button_primary_background_fill": "#0f766e",
        "button_primary_background_fill_hover": "#115e59",
        "button_primary_text_color": "#ffffff",
        "checkbox_background_color_selected": "#0f766e",
        "link_text_color": "#0f766e",
    }
    dark = {
        "body_background_fill": "#171614",
        "background_fill_primary": "#201f1c",
        "background_fill_secondary": "#272522",
        "body_text_color": "#ece9e4",
        "body_text_color_subdued": "#b3ada5",
        "border_color_primary": "#3a3733",
        "input_border_color": "#827c74",
        "input_placeholder_color": "#a8a29e",
        "checkbox_border_color": "#a8a29e",
        "button_primary_background_fill": "#0f766e",
        "button_primary_background_fill_hover": "#0d9488",
        "button_primary_text_color": "#ffffff",
        "checkbox_background_color_selected": "#0f766e",
        "link_text_color": "#5eead4",
    }
    return gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        **same_in_both,
        input_background_fill_dark="*background_fill_primary",
        block_title_background_fill_dark="transparent",
        block_title_text_color_dark="*body_text_color",
        block_title_padding="0",
        block_background_fill_dark="transparent",
        **light,
        **{f"{name}_dark": value for name, value in dark.items()},
    )
