"""`python -m scripts.scaling_report RUN... --out FOLDER`: scaling efficiency of measured runs.

Writes report.md, report.html (with its pictures inside), report.json and PNGs. Runs that differ in
more than their mesh, routing and seed are refused. `--project 16,32` adds points that were not run,
computed from the measured step (scripts/scaling_report/projection.py) and marked as such.
"""

import base64
import json
import re
import sys
from pathlib import Path

from configs.command_line import CommandParser
from configs.errors import UserError
from scripts.scaling_report.figures import report_of
from scripts.scaling_report.pictures import draw
from scripts.scaling_report.runs import read_run
from scripts.scaling_report.tables import markdown, page


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = CommandParser(prog="python -m scripts.scaling_report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--note", default="", help="a sentence about the machine, printed first")
    parser.add_argument("--project", default="", help="numbers of ranks to project to, as 16,32")
    options = parser.parse_args(arguments)
    out: Path = options.out
    try:
        if options.project and not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*", options.project):
            raise UserError(f"--project {options.project}: must be numbers such as 16,32")
        ranks = sorted({int(word) for word in options.project.split(",") if word})
        report = report_of([read_run(folder) for folder in options.runs], ranks)
        report["note"] = options.note
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        pictures = draw(out, report)
        (out / "report.md").write_text(markdown(report, pictures))
        data = {name: base64.b64encode((out / name).read_bytes()).decode() for name in pictures}
        (out / "report.html").write_text(page(report, data))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {UserError(f'{error.filename}: {error.strerror}')}", file=sys.stderr)
        return 2
    print(f"wrote {out / 'report.md'}, report.html, report.json, {', '.join(pictures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
