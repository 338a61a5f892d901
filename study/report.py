"""The report: one page that opens from disk, with the verdicts, every figure, and the numbers that the paper prints."""

import base64
import re
from html import escape

from study import claims, plan
from study.finished import CONVNET, DENSENET, MLP, stem

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: .8rem; color: #1a1a1a; }
h1, h2 { line-height: 1.2; margin: 1.6rem 0 .5rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86em; }
caption, th, td { text-align: left; }
th, td { border: 1px solid #ccc; padding: .25rem .4rem; vertical-align: top; }
td.yes { background: #e3f1e7; }
td.no { background: #f8e2dc; }
td.open { background: #fdf3d8; }
img { max-width: 100%; }
pre { background: #f6f6f6; padding: .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""
COLOURS = {**dict.fromkeys(("reproduced", "trend seen", "met", "within 0.5 points"), "yes"),
           **dict.fromkeys(("not reproduced", "trend not seen", "refused", "apart"), "no"),
           **dict.fromkeys(("inconclusive", "unclear", "open"), "open")}


def table(caption, columns, rows):
    """A table of text (**bold**); the last column is coloured by its words."""
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in columns)
    body = ""
    for first, *cells, last in rows:
        cells = "".join(f"<td>{escape(one)}</td>" for one in cells)
        colour = COLOURS.get(last.split(" (")[0], "none")
        body += f'<tr><th scope="row">{escape(first)}</th>{cells}<td class="{colour}">{escape(last)}</td></tr>'
    body = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", body)
    return (f'<div class="table" tabindex="0"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def paragraph(text):
    return f"<p>{escape(text)}</p>"


def beside_every_verdict(judged):
    """What holds for every verdict, in sentences."""
    n = sum(part.scope != claims.NO_EVIDENCE and part.outcome != claims.OPEN
            for claim in judged if claim.name in claims.EMPIRICAL for part in claim.parts)
    yield ("An interval is over trials (split where there is one, initial weights, order). All share one test set, "
           "whose own sampling error is about 0.3 points at 10 % error of 10,000 images and is not in it.")
    yield f"{n} statistics were decided at 95 % each: about {n / 20:.1f}, one in twenty, stand wrong by chance."
    yield ("The learning rate of the MLPs falls to 0.3 of itself between λ = 0.95 and 0.99 (the authors'), so what "
           "differs there is λ and rate together (C2, C5, C12 to C14, C21).")
    yield ("A margin says whose it is: an order is the paper's, a size (0.5, 1, 2, 5, 20, 60 %) is ours, and the "
           "paper's column never shows ours.")
    yield f"C15 to C20 and E1 to E3 are tests: `{claims.IDENTITY_TESTS}`."


def figure_section(runs, judged, name, one, folder):
    """A figure or table: what it shows, the claims with their statistics, what makes it, what it was made from."""
    yield f"<h2>{escape(one.about)}</h2>"
    if one.table:
        yield table(one.table.caption, one.table.columns, one.table.cells)
        yield from map(paragraph, one.table.notes)
    elif one.state != "NOT DRAWN":
        picture = base64.b64encode((folder / f"{stem(name)}.png").read_bytes()).decode()
        yield f'<img alt="{escape(one.about)}." src="data:image/png;base64,{picture}">'
    for claim in judged:
        if claim.text.get("figure") == name:
            rows = [[part.what, *part.cells, str(part.n), part.asked,
                     f"{part.scope} ({part.reason})" if part.reason else part.scope, part.outcome]
                    for part in claim.parts]
            yield (f"<details><summary><b>{claim.name}: {escape(claim.outcome)}</b> ({escape(claim.scope)}): "
                   f"{escape(claim.text['claim'])}.</summary>"
                   + table(f"{claim.text['where']}. Our reading: {claim.text.get('reading', 'none')}.", [
                       "statistic", "mean", "95 % interval", "n", "claimed", "scope", "decides"], rows) + "</details>")
    draw = f"python make_figures.py {name} --preset {runs.name}{runs.results_flag}"
    yield f"<pre>{escape(chr(10).join([*runs.commands(name, one.used), draw]))}</pre>"
    minutes = round(sum(record["seconds"] for record in one.used.values()) / 60)
    took, state = f"{minutes} minutes" if minutes else "under a minute", one.state.capitalize()
    made_from = one.provenance.replace("\n", " · ") if one.used or not one.missing else ""
    yield paragraph(f"{state}: {len(one.used)} runs of {took} in all, {len(one.missing)} missing. {made_from}")


def printed_numbers(runs):
    """Rows [what, paper, mean here, interval, n, difference, verdict] for each test error that the paper prints."""
    numbers = claims.Numbers(runs)
    for name, title in (("fig2", "Fig. 2"), ("table2", "Table 2")):
        for configuration, methods in runs.published[name]["test_error_percent"].items():
            for method, printed in methods.items():
                runs.begin()
                key = f"{configuration} {method}"
                part = claims.Statistic("", numbers.error(key), ">", unit="")
                scope, reason = claims.scope_of(part, runs)
                difference, verdict = part.mean - printed, f"not compared: {reason or scope}"
                if scope == claims.PROTOCOL:
                    verdict = "within 0.5 points" if abs(difference) <= 0.5 else "apart"
                yield [f"{title}: {key.replace('joint-', 'λ = ')}", str(printed),
                       *part.cells, str(part.n), f"{difference:+.2f}" if scope == claims.PROTOCOL else "", verdict]


def page(runs, folder, made, judged):
    """The report as HTML. made: {figure: make_figures.Made}; judged: the claims."""
    heading, counts = f"To Ensemble or Not Ensemble: what the runs say, preset {runs.name}", []
    finished = [row["run"].split("/")[1] for row in runs.every_run()]
    for name in (MLP, DENSENET, CONVNET):
        planned = plan.list_runs(runs.name, plan.experiment_of(name), runs.block[name], {})
        counts.append(f"{finished.count(name)} of {len(planned)} of {name}")
    verdicts = [[claim.name, f"{claim.text['claim']} ({claim.text['where']})", claim.scope, claim.outcome]
                for claim in judged]
    numbers = ["number", "paper", "mean here", "95 % interval", "n", "difference", "verdict"]
    parts = ['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
             '<meta name="viewport" content="width=device-width, initial-scale=1">'
             f"<title>{escape(heading)}</title><style>{CSS}</style></head><body><h1>{escape(heading)}</h1>",
             paragraph(f"{claims.headline(judged)}. Finished runs in {runs.results}: {', '.join(counts)}."),
             table("The paper's claims", ["claim", "what the paper says, and where", "scope", "outcome"], verdicts),
             "<ul>", *(f"<li>{escape(sentence)}</li>" for sentence in beside_every_verdict(judged)), "</ul>"]
    for name, one in made.items():
        parts += figure_section(runs, judged, name, one, folder)
    parts += ["<h2>The numbers that the paper prints</h2>",
              table("Test errors in per cent; parameters stand in Tables 1, 3 and 4", numbers, printed_numbers(runs)),
              "</body></html>\n"]
    return "\n".join(parts)
