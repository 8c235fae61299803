"""One self-contained HTML page about a run: no script, no link to anything outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from adaattn_core.report.summary import HeadRow, Totals
from adaattn_core.report.tables import number, total_lines

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th { background: #f4f4f4; } td.text, th.text { text-align: left; }
.bar { background: linear-gradient(#4477aa, #4477aa) no-repeat left / var(--w) 100%;
       height: .7em; width: 6em; display: inline-block; border: 1px solid #4477aa;
       margin-right: .4em; }
.broken { color: #b00020; font-weight: bold; }
"""

_COLUMNS = (
    ("batch", False),
    ("head", False),
    ("structure", True),
    ("qk", True),
    ("pv", True),
    ("rank", False),
    ("share of scores", True),
    ("certified upper", False),
    ("guarantee", True),
    ("estimate", False),
    ("true error", False),
    ("true row error", False),
    ("held", True),
    ("why", True),
)


def render_report(
    title: str,
    rows: Iterable[HeadRow],
    totals: Totals,
    settings: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> str:
    """Return the page as text.

    Parameters
    ----------
    title : str
        Heading, for example the input's name.
    rows : iterable of HeadRow
    totals : Totals
    settings : mapping of str to object
        What was asked: budget, mask, shapes.
    provenance : mapping of str to object
        What computed it.
    """
    head = "".join(_cell("th", name, text) for name, text in _COLUMNS)
    body = "\n".join(f"<tr>{_row(row)}</tr>" for row in rows)
    sums = "".join(f"<p>{escape(line)}</p>" for line in total_lines(totals))
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>AdaAttn: {escape(title)}</title>
<style>{_STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
{sums}
<h2>Asked</h2>
{_facts(settings)}
<h2>Heads</h2>
<p>With the stated confidence, at least the stated share of a head's query rows err by at most
<em>certified upper</em> times the head's root-mean-square output row. The estimate and the true
error are relative Frobenius errors; the true row error is the row quantile that the certificate
speaks about.</p>
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table>
<h2>Computed by</h2>
{_facts(provenance)}
</body>
</html>
"""


def _cell(tag: str, content: str, text: bool, *, is_html: bool = False) -> str:
    css = ' class="text"' if text else ""
    return f"<{tag}{css}>{content if is_html else escape(content)}</{tag}>"


def _row(row: HeadRow) -> str:
    certificate = row.certificate
    bar = f'<span class="bar" style="--w:{100 * row.share:.1f}%"></span>{row.share:.3f}'
    held = {None: "-", True: "yes", False: '<span class="broken">no</span>'}[row.covered]
    values = (
        str(row.index[0]),
        str(row.index[1]),
        row.plan.structure.kind,
        row.plan.qk,
        row.plan.pv,
        str(row.rank),
        bar,
        number(certificate.upper),
        f"{certificate.guarantee}, {certificate.rows:g} of rows at {certificate.confidence:g}",
        number(certificate.estimate),
        number(row.true_frobenius),
        number(row.true_rows),
        held,
        row.plan.reason,
    )
    columns: Sequence[tuple[str, bool]] = _COLUMNS
    return "".join(
        _cell("td", value, text, is_html=name in ("share of scores", "held"))
        for value, (name, text) in zip(values, columns, strict=True)
    )


def _facts(facts: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr>{_cell('th', str(name), True)}{_cell('td', str(value), True)}</tr>"
        for name, value in facts.items()
    )
    return f"<table>{lines}</table>"
