"""A comparison as JSON and as pages that open without a server or a script."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from random import Random
from typing import Any

from eval.analysis import Analysis, ArmResult, Pair
from eval.examples import EvalExample
from eval.journal import Journal, Row, Run
from eval.pictures import draw_all
from eval.scoring import answer_words, score_row
from eval.statistics import Interval
from rag.errors import ReadError

PAGE, FAILURES, NUMBERS = "report.html", "failures.html", "report.json"
_MOST_FAILURES = 30
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 88rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: .6rem 0 1.6rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
         vertical-align: top; white-space: nowrap }
th { white-space: normal } th:first-child, td:first-child { text-align: left }
caption { text-align: left; color: #555; padding: .2rem 0 }
img { max-width: 100%; height: auto } .none { color: #777 }
.verdict { border-left: 4px solid #0072B2; padding: .2rem 1rem; background: #f5f8fb }
.wide { overflow-x: auto } pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem }
h3 { margin-bottom: .2rem } .right { color: #00674c } .wrong { color: #a63c00 }
"""


def write_report(
    analysis: Analysis,
    examples: Sequence[EvalExample],
    journal: Journal,
    folder: Path,
    *,
    with_failures: bool = True,
) -> Path:
    """Write numbers, pictures and pages into the folder; return the page to open.

    The page of failures quotes questions, answers and passages: leave it out where those may not
    be shown to everybody who reads the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(to_json(analysis), ensure_ascii=False, indent=1, allow_nan=False)
    _put(folder / NUMBERS, numbers + "\n")
    pictures = draw_all(analysis, folder)
    if with_failures:
        _put(folder / FAILURES, _failures_page(examples, journal))
    _put(folder / PAGE, _page(analysis, pictures, with_failures=with_failures))
    return folder / PAGE


def read_report(folder: Path, pictures: str) -> str:
    """Return what stands on the page of a report, to be shown within another page.

    Args:
        folder: of the report.
        pictures: what the addresses of its pictures begin with there.

    Raises:
        ReadError: if there is no report.
    """
    try:
        page = (folder / PAGE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReadError(
            f"{folder.name} has no report yet", hint="it is written when the comparison ends"
        ) from None
    return re.sub(r'<img src="(?=[a-z]+\.png")', f'<img src="{escape(pictures)}', _body(page))


def read_failures(folder: Path) -> str:
    """Return what stands on a report's page of failures; empty if it was written without one."""
    path = folder / FAILURES
    return _body(path.read_text(encoding="utf-8")) if path.is_file() else ""


def to_json(analysis: Analysis) -> dict[str, Any]:
    """Return the analysis as JSON has it: what is not a number is null."""
    found: dict[str, Any] = _plain(asdict(analysis))
    return found


def summary(analysis: Analysis) -> str:
    """Return the paired table and the verdict in text, for a terminal."""
    lines = [
        f"{analysis.num_examples:,} questions on {analysis.num_documents:,} documents",
        f"{'arm':<14}{'n':>5}  {'score, 95%':<20}{'declined':>9}{'tokens':>9}{'computed':>9}"
        f"{'seconds':>9}  {'does not fit':>12}",
    ]
    lines += [
        f"{r.arm:<14}{r.num_questions:>5}  {_score(r.score):<20}"
        f"{_share(r.declines_what_cannot):>9}{r.prompt_tokens:>9,.0f}{r.computed_tokens:>9,.0f}"
        f"{r.seconds:>9.2f}  {r.does_not_fit:>12,}"
        for r in analysis.arms
    ]
    return "\n".join([*lines, "", *analysis.verdict])


# ---- the page -----------------------------------------------------------------------------------


def _page(analysis: Analysis, pictures: Mapping[str, str], *, with_failures: bool) -> str:
    parts = [
        f"<h1>Comparison: {escape(_title(analysis))}</h1>",
        '<div class="verdict"><h2>Verdict</h2>',
        "".join(f"<p>{escape(line)}</p>" for line in analysis.verdict) or "<p>nothing to say</p>",
        "</div>",
        "<h2>Every way to answer</h2>",
        "<ul>",
        *(f"<li><b>{escape(r.arm)}</b>: {escape(r.about)}</li>" for r in analysis.arms),
        "</ul>",
        _arms_table(analysis.arms),
        "<h2>Paired differences</h2>",
        _pairs_table(analysis.pairs),
        "<h2>Evidence and citations</h2>",
        _evidence_table(analysis.arms),
        "<h2>Abstention</h2>",
        _abstention_table(analysis.arms),
    ]
    if analysis.gap_closed is not None:
        words = (
            "The router is above the oracle router: it does not only choose between the two routes,"
            " it also answers otherwise than they do, by quotation or by a count."
            if analysis.gap_closed > 1
            else "Of the way from the best single arm to the oracle router, the router went"
            f" {100 * analysis.gap_closed:.0f}%. The oracle picks lucky answers too, so all of it"
            " cannot be gone."
        )
        parts.append(f"<p>{words}</p>")
    for name, title in pictures.items():
        parts.append(f'<h2>{escape(title)}</h2><img src="{escape(name)}" alt="{escape(title)}">')
    parts += [
        "<h2>By slice</h2>",
        _slices_table(analysis),
        f'<p><a href="{FAILURES}">Questions that divide the arms</a></p>' if with_failures else "",
        f'<p><a href="{NUMBERS}">All numbers as JSON</a></p>',
        "<h2>What these numbers are of</h2>",
        _sources(analysis),
    ]
    return _html(_title(analysis), parts)


def _title(analysis: Analysis) -> str:
    run = analysis.runs[0] if analysis.runs else None
    about = f"{run.data}, {run.model}" if run else "no run"
    return f"{about}, {analysis.num_examples:,} questions"


def _arms_table(arms: Sequence[ArmResult]) -> str:
    rows = [
        [
            result.arm,
            f"{result.num_questions:,}",
            _score(result.score),
            _score(result.rest),
            _number(result.f1),
            _number(result.exact),
            f"{result.prompt_tokens:,.0f}",
            f"{result.computed_tokens:,.0f}",
            f"{result.new_tokens:,.0f}",
            "" if result.kv_bytes is None else f"{result.kv_bytes / 2**20:,.1f}",
            f"{result.seconds:,.2f}",
            _number(result.seconds_a_right_answer),
            f"{result.does_not_fit:,}",
            f"{result.failed:,}",
            f"{result.escalated:,}",
            ", ".join(f"{route} {n:,}" for route, n in result.routes.items()),
        ]
        for result in arms
    ]
    head = (
        "arm", "n", "score [95%]", "not known closed book", "F1", "exact", "prompt tokens",
        "computed", "new", "KV MiB", "seconds", "s a right one", "does not fit", "failed",
        "tried again", "taken",
    )  # fmt: skip
    about = "Of an answer that was tried again, seconds are of all tries, tokens of the last."
    return _table(head, rows, caption=about)


def _pairs_table(pairs: Sequence[Pair]) -> str:
    rows = [
        [
            f"{pair.first} - {pair.second}",
            f"{pair.num_pairs:,}",
            _points(pair.difference),
            f"{pair.only_first} : {pair.only_second}",
            _number(pair.p_value, 4),
            _number(pair.mid_p, 4),
            _number(pair.holm, 4),
            f"{pair.design_effect:.2f}",
            f"{pair.num_pairs / pair.design_effect:,.0f}",
            f"{100 * pair.detectable:.0f}",
            pair.words,
        ]
        for pair in pairs
    ]
    head = (
        "pair", "questions", "difference in points [95%]", "one alone right", "McNemar p", "mid-p",
        "Holm", "design effect", "effective n", "detectable, points", "verdict",
    )  # fmt: skip
    return _table(
        head,
        rows,
        caption="An interval that holds 0 shows no difference. It is the wider of two: documents"
        " drawn, and questions drawn.",
    )


def _evidence_table(arms: Sequence[ArmResult]) -> str:
    names = next((list(r.recall) for r in arms if r.recall), [])
    rows = [
        [
            r.arm,
            _share(r.shown),
            _share(r.correct_if_shown),
            _share(r.correct_if_not),
            _score(r.citation_precision),
            _score(r.citation_recall),
            _share(r.verbatim),
            *(_share(r.recall.get(name)) for name in names),
        ]
        for r in arms
    ]
    head = (
        "arm", "evidence shown", "score if shown", "score if not", "citation precision",
        "citation recall", "verbatim", *(f"recall {name}" for name in names),
    )  # fmt: skip
    return _table(head, rows)


def _abstention_table(arms: Sequence[ArmResult]) -> str:
    rows = [
        [
            r.arm,
            _share(r.answers_what_can_be),
            _share(r.declines_what_cannot),
            _share(r.balanced_accuracy),
            f"{r.crag:+.3f}",
            _number(r.aurc, 3),
            f"{r.words:.0f}",
        ]
        for r in arms
    ]
    head = (
        "arm", "answers what can be", "declines what cannot", "balanced accuracy",
        "CRAG (+1, 0, -1)", "area under risk", "words",
    )  # fmt: skip
    return _table(head, rows)


def _slices_table(analysis: Analysis) -> str:
    arms = list(dict.fromkeys(cell.arm for cell in analysis.cells))
    places = list(dict.fromkeys((cell.slice, cell.value) for cell in analysis.cells))
    at = {(cell.slice, cell.value, cell.arm): cell for cell in analysis.cells}
    rows = []
    for place in places:
        found = [at.get((*place, arm)) for arm in arms]
        shown = [f"{_score(c.score)} n {c.num_questions:,}" if c else "" for c in found]
        rows.append([f"{place[0].replace('_', ' ')}: {place[1]}", *shown])
    return _table(("slice", *arms), rows)


def _sources(analysis: Analysis) -> str:
    parts = []
    for run in analysis.runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        settings = ", ".join(f"{name} = {value}" for name, value in run.settings.items())
        documents = "".join(
            f"<li>{escape(name)}: <code>{sha}</code></li>" for name, sha in run.documents.items()
        )
        parts.append(
            f"<pre>{escape(run.command)}</pre><p>begun {escape(run.started)}; commit"
            f" {escape(run.commit or 'unknown')}; {escape(run.device)}, {run.num_threads} threads;"
            f" {escape(versions)}<br>model {escape(run.model)}, weights"
            f" <code>{escape(run.model_sha256 or 'held by a server')}</code>; embedder"
            f" {escape(run.embedder)}<br>examples <code>{run.examples_sha256}</code>, seed"
            f" {run.seed}; {escape(settings)}{_looks(run)}</p><details><summary>documents</summary>"
            f"<ul>{documents}</ul></details>"
        )
    return "".join(parts)


def _looks(run: Run) -> str:
    """Return how often these questions were looked at, where they are held out."""
    if not run.held_out_looks:
        return ""
    return f"<br>comparison {run.held_out_looks:,} on these held-out questions on this machine"


# ---- the failures page --------------------------------------------------------------------------


def _failures_page(examples: Sequence[EvalExample], journal: Journal) -> str:
    """Return the page of up to 30 questions, drawn at random, that some arms got right alone."""
    by_example: dict[str, list[Row]] = {}
    for row in journal.rows:
        by_example.setdefault(row.example_id, []).append(row)
    discordant = []
    for example in examples:
        rows = by_example.get(example.id, [])
        right = {s.correct for row in rows if (s := score_row(example, row)) is not None}
        if len(right) > 1:
            discordant.append((example, rows))
    chosen = Random(0).sample(discordant, min(_MOST_FAILURES, len(discordant)))
    parts = [
        "<h1>Where the arms disagree</h1>",
        f"<p>{len(chosen):,} of {len(discordant):,} questions that some arms answered rightly and"
        f" others did not, drawn at random. <a href='{PAGE}'>Back to the report</a></p>",
    ]
    for example, rows in chosen:
        gold = "; ".join(example.answers) or "(the document does not hold an answer)"
        parts.append(
            f"<h3>{escape(example.question)}</h3><p>{escape(example.id)},"
            f" {escape(example.document)}<br>expected: {escape(gold)}</p>"
        )
        parts += [_answer_part(example, row) for row in rows]
    return _html("Where the arms disagree", parts)


def _answer_part(example: EvalExample, row: Row) -> str:
    scores = score_row(example, row)
    if scores is None or row.answer is None:
        return f"<p><b>{escape(row.arm)}</b>: {escape(row.outcome)}: {escape(row.reason)}</p>"
    mark = "right" if scores.correct else "wrong"
    prompt = ""
    if row.prompt:
        prompt = f"<details><summary>prompt</summary><pre>{escape(row.prompt)}</pre></details>"
    shown = (
        "" if scores.evidence_in_prompt is None else f", evidence {scores.evidence_in_prompt:.0%}"
    )
    return (
        f"<p><b>{escape(row.arm)}</b> <span class='{mark}'>{mark}</span>"
        f" ({scores.route}{shown}): {escape(answer_words(row.answer))}</p>{prompt}"
    )


# ---- small things -------------------------------------------------------------------------------


def _html(title: str, parts: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _body(page: str) -> str:
    return page[page.index("<body>") + len("<body>") : page.rindex("</body>")]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> str:
    if not rows:
        return '<p class="none">nothing to show</p>'
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    about = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        '<div class="wide" tabindex="0" role="group" aria-label="Table">'
        f"<table>{about}<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _score(interval: Interval | None) -> str:
    if interval is None or math.isnan(interval.mean):
        return ""
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _points(interval: Interval) -> str:
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}%"


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a record holds
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _put(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the whole new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
