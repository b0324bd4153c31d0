"""HTML: a page without scripts or anything from elsewhere, tables, and a stranger's texts in them.

Whatever is given as `str` is escaped; what is HTML already is `Html`. A browser that obeys the page's policy fetches
and runs nothing, even if a text got through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from loaders.words import shown

LONGEST = 600  # characters of one cell or line
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root{color-scheme:light dark;--line:#d9d9d9;--soft:#f5f6f8;--dim:#5f6368;--link:#1a5fb4;--star:#b35900}
@media (prefers-color-scheme:dark){:root{--line:#3c4043;--soft:#26282b;--dim:#a0a5ab;--link:#8ab4f8;--star:#ffb454}}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;padding:1.5rem;max-width:62rem}
h1{font-size:1.6rem;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2rem 0 .6rem}
p{margin:.4rem 0}.dim{color:var(--dim)}a{color:var(--link)}
.numbers{display:flex;flex-wrap:wrap;gap:.7rem;margin:1.2rem 0}
.numbers div{background:var(--soft);border-radius:.5rem;padding:.6rem 1rem;min-width:7rem}
.numbers b{display:block;font-size:1.25rem;font-weight:600}.numbers span{color:var(--dim);font-size:.85rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem}
th,td{padding:.3rem .9rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;white-space:nowrap}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code,pre{font:.86rem/1.45 ui-monospace,monospace;unicode-bidi:isolate}code{overflow-wrap:anywhere}
pre{background:var(--soft);border-radius:.5rem;padding:.8rem 1rem;white-space:pre-wrap;overflow-wrap:anywhere}
svg{max-width:100%;height:auto;display:block}figure{margin:1rem 0}figcaption{font-weight:600;font-size:.9rem}
ul{padding-left:1.2rem;margin:.4rem 0}.star{color:var(--star);font-weight:700}.fault{color:#c5221f}
"""


class Html(str):
    """A text that is HTML already."""

    __slots__ = ()


def text(value: str) -> Html:
    """Return a text as HTML; what a terminal or a browser would obey stands in it as it is written."""
    return value if isinstance(value, Html) else Html(escape(shown(value[:LONGEST]), quote=True))


def code(value: str) -> Html:
    return Html(f"<code>{text(value)}</code>")


def block(value: str) -> Html:
    """Return lines to copy."""
    return Html(f"<pre><code>{escape(shown(value))}</code></pre>")


def tag(name: str, value: str, kind: str = "") -> Html:
    of = f' class="{kind}"' if kind else ""
    return Html(f"<{name}{of}>{text(value)}</{name}>")


def joined(parts: Iterable[str], by: str = "") -> Html:
    return Html(by.join(text(part) for part in parts))


def link(value: str, address: str) -> Html:
    """Return a link; an address that is neither a page of the web nor a file beside this one is only shown."""
    is_safe = address.startswith(("https://", "http://", "#")) or ":" not in address.partition("/")[0]
    return Html(f'<a href="{escape(shown(address), quote=True)}">{text(value)}</a>') if is_safe else text(value)


def items(values: Iterable[str]) -> Html:
    found = joined(tag("li", value) for value in values)
    return tag("ul", found) if found else Html("")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Return a table; columns that begin with "-" hold numbers, which are aligned to the right."""
    kinds = ["n" if column.startswith("-") else "" for column in columns]
    head = joined(tag("th", column.removeprefix("-"), kind) for column, kind in zip(columns, kinds, strict=True))
    body = [tag("tr", joined(tag("td", c, k) for c, k in zip(row, kinds, strict=True))) for row in rows]
    return Html(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{joined(body)}</tbody></table></div>')


def numbers(rows: Iterable[tuple[str, str]]) -> Html:
    """Return the numbers that count most: each with its words below it."""
    return tag(
        "div", joined(tag("div", joined([tag("b", value), tag("span", what)])) for value, what in rows), "numbers"
    )


def section(title: str, parts: Iterable[str]) -> Html:
    """Return a section, or nothing if there is nothing in it."""
    inside = joined(part for part in parts if part)
    return joined([tag("h2", title), inside], "\n") if inside else Html("")


def figure(title: str, svg: str) -> Html:
    return Html(f"<figure><figcaption>{text(title)}</figcaption>{svg}</figure>")


def page(title: str, parts: Iterable[str]) -> bytes:
    """Return a whole page."""
    body = joined((part for part in parts if part), "\n")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    ).encode()
