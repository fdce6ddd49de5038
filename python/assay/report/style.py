"""The page's style: dark where the reader's screen is, narrow where it is, in colours that the colour-blind tell
apart (Okabe and Ito's)."""

from __future__ import annotations

from assay.report.html import Html

_HEAT = 10

_RULES = """
:root { color-scheme: light dark; --ground: #f7f7f5; --card: #ffffff; --ink: #1b1f24; --quiet: #626a73; --line: #d9dbde;
  --link: #005a8e; --bar: #0072b2; --mark: #b34a00; --plus: 0, 114, 178; --minus: 213, 94, 0; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --card: #1d2125; --ink: #e7e9eb; --quiet: #a0a8b0; --line: #363c42;
    --link: #7cc4f2; --bar: #56b4e9; --mark: #f0a830; --plus: 86, 180, 233; --minus: 230, 130, 40; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header { max-width: 74rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
main { padding-bottom: 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .4rem; padding-top: .8rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h4 { font-size: 1rem; margin: 1rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--link); }
nav { margin: 1.2rem 0 0; padding: .7rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
nav ol { margin: 0; padding-left: 1.4rem; }
nav ul { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .9rem; }
nav li { overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1rem 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tiles dt { color: var(--quiet); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.quantiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr)); gap: .3rem .5rem;
  margin: .6rem 0; font-size: .85rem; font-variant-numeric: tabular-nums; }
.quantiles dt { color: var(--quiet); }
.quantiles dd { margin: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem;
  margin-top: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem;
  min-width: 0; }
svg { display: block; width: 100%; height: auto; max-width: 38rem; margin: .5rem 0; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; max-width: 100%; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td { white-space: nowrap; }
tbody th { position: sticky; left: 0; background: var(--ground); white-space: pre-wrap; }
th { font-weight: 600; }
tbody th, thead th:first-child { text-align: left; min-width: 5rem; max-width: 22rem; overflow-wrap: break-word; }
thead th { vertical-align: bottom; }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
.words thead th { text-align: left; }
.matrix td, .matrix th { text-align: center; min-width: 3rem; }
.matrix tbody th, .matrix thead th:first-child { text-align: left; min-width: 8rem; }
.matrix thead th { font-weight: 400; color: var(--quiet); }
.stack > .card { margin-top: 1rem; }
.small { display: block; font-weight: 400; color: var(--quiet); font-size: .78rem; }
.ends { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1.2rem; }
.ends > div { min-width: 0; }
.sample { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .8rem; margin: 0 0 1rem; }
.best .sample { border-color: var(--bar); }
.worst .sample { border-color: var(--mark); }
.sample .id { overflow-wrap: anywhere; }
.value { font-weight: 600; font-variant-numeric: tabular-nums; }
.column { color: var(--quiet); font-size: .8rem; margin-top: .35rem; overflow-wrap: anywhere; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 13rem; overflow-y: auto; font-size: .92rem; }
.sample img { display: block; max-width: 100%; height: auto; min-width: 4rem; border: 1px solid var(--line);
  image-rendering: auto; }
pre { overflow: auto; max-height: 30rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .8rem; font-size: .82rem; }
summary { cursor: pointer; color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media (max-width: 30rem) { main, header { padding-left: .8rem; padding-right: .8rem; } h1 { font-size: 1.4rem; }
  .card { padding: .7rem .7rem; } tbody th { min-width: 7.5rem; max-width: 9rem; overflow-wrap: anywhere; } }
@media print { .text, pre { max-height: none; } .card, .sample { break-inside: avoid; } }
"""


def style() -> Html:
    """The rules, with ten depths of colour for numbers above zero and ten for those below."""
    heat = [
        f".{name}{step} {{ background: rgba(var(--{colour}), {0.06 * step:.2f}); }}"
        for name, colour in (("p", "plus"), ("m", "minus"))
        for step in range(_HEAT + 1)
    ]
    return Html(_RULES + "\n".join(heat) + "\n")


def heat(value: float) -> str:
    """The class of a cell whose number lies between -1 and 1; none of what is no number."""
    if value != value:
        return ""
    return f"{'p' if value >= 0 else 'm'}{round(abs(value) * _HEAT)}"
