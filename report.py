"""The report: one page that opens from disk, with the verdicts, the numbers and every figure.

    python report.py                        # figures, verdicts, claims.csv and figures/PRESET/report.html

Trains nothing; draws and judges as claims.py does.
"""

import base64
import collections
import csv
import datetime
import sys
from html import escape

import study
import claims
import common
import folders
import make_figures
from claims import EMPIRICAL, PROTOCOL, Numbers
from finished import CONVNET, DENSENET, MLP

import numpy as np

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 62rem;
  padding: 1rem; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem; } h1 { margin-top: 0; font-size: 1.7rem; }
h2 { border-bottom: 1px solid #ccc; padding-bottom: .2rem; } nav a { margin-right: 1rem; }
.table { overflow-x: auto; margin: 1rem 0; } caption { text-align: left; padding: .2rem 0; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { border: 1px solid #ccc; padding: .3rem .5rem; text-align: left; vertical-align: top; overflow-wrap: normal; }
td:nth-child(2) { min-width: 4rem; } th { background: #f2f2f2; }
td.yes { background: #e3f1e7; } td.no { background: #f8e2dc; } td.open { background: #fdf3d8; }
td.none { color: #595959; } small { color: #595959; }
img { max-width: 100%; height: auto; } summary { cursor: pointer; }
pre { background: #f6f6f6; padding: .6rem; white-space: pre-wrap; font-size: .82rem; }
@media (max-width: 40rem) { body { padding: .6rem; } table { font-size: .8rem; } th, td { padding: .2rem .3rem; } }
@page { margin: 11mm; }
@media print { body { max-width: none; font: 8pt/1.3 sans-serif; padding: 0; } h2, h3 { margin: .8rem 0 .3rem; }
  table { font-size: 7pt; line-height: 1.2; } .table { overflow: visible; margin: .4rem 0; } p { margin: .3rem 0; }
  th, td { padding: .1rem .3rem; } section { display: inline-block; width: 48%; margin-right: 1%; vertical-align: top; }
  section.wide { width: 100%; } section pre, nav { display: none; }
  h2, h3, img, tr, section { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""
COLOURS = {"reproduced": "yes", "trend seen": "yes", "verified": "yes", "met": "yes", "within 0.5 points": "yes",
           "agrees": "yes", "not reproduced": "no", "trend not seen": "no", "refuted": "no", "refused": "no",
           "apart": "no", "differs": "no", "erratum": "open", "open": "open"}


def table(caption, columns, rows):
    """A table of text; the last column is coloured by its words."""
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in columns)
    lines = []
    for *cells, last in rows:
        kind = COLOURS.get(last, "open" if last.startswith(("inconclusive", "unclear")) else "none")
        lines.append(f'<tr><th scope="row">{escape(cells[0])}</th>' + "".join(
            f"<td>{escape(one)}</td>" for one in cells[1:]) + f'<td class="{kind}">{escape(last)}</td></tr>')
    return (f'<div class="table" tabindex="0"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div>')


def paragraph(text):
    return f"<p>{escape(text)}</p>"


def verdicts(judged):
    rows = [[claim.name, f"{claim.claim} ({claim.where})", claim.scope, claim.outcome] for claim in judged]
    return table("The paper's claims", ["claim", "what the paper says, and where", "scope", "outcome"], rows)


def figure_section(runs, judged, name, one, folder):
    """A figure or table: what it shows, the claims with their statistics, what makes it, what it was made from."""
    draw = (make_figures.FIGURES | make_figures.TABLES)[name]
    about = " ".join(draw.__doc__.split()).split(": ", 1)[1].removesuffix(".")
    width = "wide" if one.table else "narrow"
    yield (f'<section class="{width}"><h3 id="{make_figures.stem(name)}">{make_figures.title(name)}: {escape(about)}'
           "</h3>")
    if one.state == "NOT DRAWN":
        yield paragraph("Not drawn: none of its runs is there.")
    elif one.table:
        yield table(one.table.caption, one.table.columns, [[cell.replace("**", "") for cell in row]
                                                           for row in one.table.cells])
        yield from map(paragraph, one.table.notes)
    else:
        picture = base64.b64encode((folder / f"{make_figures.stem(name)}.png").read_bytes()).decode()
        yield f'<p><img alt="{escape(about)}." src="data:image/png;base64,{picture}"></p>'
    for claim in judged:
        if runs.published["claims"][claim.name].get("figure") == name:
            rows = [[part.what, *part.cells, str(part.n), part.asked, part.scope + f" ({part.reason})" * bool(
                part.reason), part.outcome] for part in claim.parts]
            yield (f"<details><summary><b>{claim.name}: {escape(claim.outcome)}</b> ({escape(claim.scope)}): "
                   f"{escape(claim.claim)}.</summary>" + paragraph(f"{claim.where}. Our reading: {claim.reading}.")
                   + table("Statistics", ["statistic", "mean", "95 % interval", "n", "claimed", "scope", "decides"],
                           rows) + "</details>")
    commands = [*runs.commands(name, one.used),
                f"python make_figures.py {name} --preset {runs.name}{runs.results_flag}"]
    yield f"<pre>{escape(chr(10).join(commands))}</pre>"
    if one.used:
        minutes = sum(record["seconds"] for record in one.used.values()) / 60
        missing = f" {len(one.missing)} runs are missing." if one.missing else ""
        less = [line for line in one.provenance.split("\n") if ", reduced: " in line]     # the rest is in the figure
        yield (f"<p><small>{len(one.used)} runs, {minutes:.0f} minutes of training in all.{missing} "
               f"{escape('. '.join(less if not one.table else one.provenance.split(chr(10))))}</small></p>")
    yield "</section>"


def printed_numbers(runs, made):
    """Rows [what, paper, here, n, difference, verdict] for each number that the paper prints."""
    numbers, published = Numbers(runs), runs.published
    for experiment, figure in ((MLP, "fig2"), (DENSENET, "table2")):
        for configuration, methods in published[figure]["test_error_percent"].items():
            for method, printed in methods.items():
                runs.begin()
                part = claims.Statistic("", numbers.error(experiment, configuration, method), ">")
                scope, reason = claims.scope_of(part, runs)
                what = f"{make_figures.title(figure.removeprefix('fig'))}: {configuration} " + (
                    method.replace("joint-", "λ = "))
                yield [what, str(printed), *compared(list(part.values.values()), printed, scope, reason)]
    for name in ("table1", "table4"):
        counts = {row["configuration"]: row["parameters"] for row in made[name].table.rows}
        for configuration, row in published[name]["rows"].items():
            printed = row["parameters"]
            digits = len(printed.rstrip("M").split(".")[1])
            agrees = f"{counts[configuration] / 1e6:.{digits}f}M" == printed
            yield [f"{make_figures.title(name)}: {configuration}, parameters", printed, f"{counts[configuration]:,}",
                   "", "", "agrees" if agrees else "differs"]


def compared(values, printed, scope, reason):
    """[here, n, difference, verdict] for a test error over trials beside the printed one."""
    if not values:
        return ["", "0", "", "not tested: no run"]
    mean, low, high = claims.interval(values)
    here = f"{mean:.2f}" + (f" [{max(0, low):.2f}, {min(100, high):.2f}]" if len(values) > 1 else "")
    if scope != PROTOCOL:
        return [here, str(len(values)), "", f"not compared: {reason or scope}"]
    return [here, str(len(values)), f"{mean - printed:+.2f}",
            "within 0.5 points" if abs(mean - printed) <= 0.5 else "apart"]


def spread():
    """What rounding alone does to a test error, from the five runs of benchmarks/spread.py."""
    path = folders.HERE / "expected" / "paper" / "spread.csv"
    if not path.is_file():
        return f"How far one trial moves by rounding is not known here: {path} is missing (benchmarks/spread.py)."
    with open(path, newline="", encoding="utf-8") as file:
        errors = [float(row["test_error_percent"]) for row in csv.DictReader(file)]
    return (f"A trial is a sample, not a constant: {len(errors)} runs of trial 0 of 1x1024H that differ in one bit of "
            f"one initial weight gave {min(errors):.2f} to {max(errors):.2f} %, a standard deviation of "
            f"{np.std(errors, ddof=1):.2f} points.")


def finished_runs(runs, rows):
    """How many of the training runs that the preset plans are finished. rows: those of FinishedRuns.every_run."""
    there = collections.Counter(row["run"].split("/")[1] for row in rows)
    counts = (f"{there[name]} of {len(study.list_runs(runs.name, study.experiment_of(name), runs.block(name), {}))} of "
              f"{name}" for name in (MLP, DENSENET, CONVNET))
    return f"Finished runs: {', '.join(counts)}."


def diagnosis(runs):
    """Rows on what the members' training errors after epoch 3 say of end-to-end training, of runs of over 30 epochs."""
    numbers = Numbers(runs)
    for experiment in (MLP, DENSENET, CONVNET):
        for name, block in runs.block(experiment)["configurations"].items():
            runs.begin()
            found = numbers.dominance(experiment, name, 1) if block["members"] > 1 else {}
            found = {trial: row for trial, row in found.items() if "same" in row}
            if not found or min(record["settings"]["epochs"] for record in runs.used.values()) <= 30:
                continue
            worse = claims.paired(numbers.error(experiment, name, "joint-1"),
                                  numbers.error(experiment, name, "joint-0"), lambda one, other: one > other)
            flagged = {trial: row["gap_at_epoch_3"] >= common.DIAGNOSIS[1] for trial, row in found.items()}
            right = [flagged[trial] == worse[trial] for trial in flagged.keys() & worse.keys()]
            gap = np.mean([row["gap_at_epoch_3"] for row in found.values()])
            yield [name, str(len(found)), f"{gap:.1f}", counted(flagged.values()),
                   counted(row["same"] for row in found.values()), f"{1 / block['members']:.2f}",
                   counted(claims.ahead(row) > 0 for row in found.values()), counted(worse.values()), counted(right)]


def counted(values):
    """Truths counted: "2 of 3"."""
    values = list(values)
    return f"{sum(values)} of {len(values)}" if values else ""


def page(runs, folder, made, judged):
    """The report as HTML, part by part."""
    now, here = datetime.datetime.now().astimezone(), folders.machine(study.torch.device("cpu"))
    title, rows = f"To Ensemble or Not Ensemble: what the runs say, preset {runs.name}", list(runs.every_run())
    yield (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width='
           f'device-width, initial-scale=1"><title>{escape(title)}</title><link rel="icon" href="data:,">'
           f"<style>{CSS}</style></head><body><main><h1>{escape(title)}</h1>")
    yield paragraph(f"{claims.headline(judged)}.")
    counts = collections.Counter(claim.outcome.split(" (")[0].split(":")[0] for claim in judged)
    yield paragraph("All claims: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()) + ".")
    yield paragraph(finished_runs(runs, rows))
    yield verdicts(judged)
    yield "<nav><b>Contents</b><br>" + "".join(f'<a href="#{target}">{escape(text)}</a>' for target, text in (
        *((make_figures.stem(name), make_figures.title(name)) for name in made), ("numbers", "The paper's numbers"),
        ("diagnosis", "Early diagnosis"), ("identities", "Identities and errata"), ("made", "Made with"))) + "</nav>"
    yield "<h2>Figures and tables</h2>"
    for name, one in made.items():
        yield from figure_section(runs, judged, name, one, folder)
    yield '<h2 id="numbers">The numbers that the paper prints</h2>'
    yield table("Test errors in per cent, mean over n trials with the 95 % interval; parameters are counts",
                ["number", "paper", "here", "n", "difference", "verdict"], printed_numbers(runs, made))
    yield paragraph(spread())
    yield '<h2 id="diagnosis">Early diagnosis</h2>'
    yield paragraph("The paper says that the members' training errors in the first epochs tell whether an ensemble is "
                    "over capacity for end-to-end training. Here the sign is that after epoch 3 of a run at λ = 1 the "
                    f"two lowest are at least {common.DIAGNOSIS[1]} points apart. The sign is right if end-to-end then "
                    "loses to independent training of the same trial, or if there is none and end-to-end does not.")
    signs = list(diagnosis(runs))
    yield table("Runs of more than 30 epochs", [
        "configuration", "trials", "gap (points)", "sign seen", "best after epoch 3 is best at the end", "by chance",
        "one member dominates at the end", "end-to-end worse than independent", "sign right"], signs) if signs else (
        paragraph("No end-to-end run of more than 30 epochs is there."))
    yield '<h2 id="identities">Identities and errata</h2>'
    yield table("Computed on several random shapes", ["claim", "what is computed", "deviation", "claimed", "decides"], [
        [claim.name, part.what, part.cells[0], part.asked, part.outcome]
        for claim in judged if claim.name not in EMPIRICAL for part in claim.parts])
    yield '<h2 id="made">Made with</h2>'
    packages = ", ".join(f"{name} {here[name]}" for name in ("torch", "torchvision", "numpy"))
    made_on, made_by = (", ".join(sorted({str(row[key]) for row in rows})) for key in ("device", "commit"))
    yield paragraph(f"The runs were made on {made_on or 'no machine yet'}, by the code of commit {made_by or 'none'}.")
    yield paragraph(f"{now:%Y-%m-%d %H:%M}, from {runs.results / runs.name}. Python {here['python']}, {packages}; "
                    f"code: {here['commit']}. run.json of each run and runs.csv have the versions that made it; "
                    "docs/open-questions.md has what the paper leaves open and what was taken here.")
    yield "</main></body></html>\n"


def main():
    runs, folder, made, judged = claims.draw_and_judge(make_figures.parser(__doc__).parse_args())
    text = "\n".join(page(runs, folder, made, judged))
    folders.write(folder / "report.html", lambda file: file.write(text.encode()))
    print(f"report: {folder / 'report.html'}")
    sys.exit(0 if all(one.state != "NOT DRAWN" for one in made.values()) else 1)


if __name__ == "__main__":
    study.command_line(main)
