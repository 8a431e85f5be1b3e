"""Draw a terminal transcript for the README: `python docs/recording.py < TRANSCRIPT > docs/quickstart.svg`.

The transcript is what the commands printed at 80 columns; `$ ` begins a command, `...` marks omitted lines.
"""

import io
import re
import sys

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text


def drawing(transcript: str) -> str:
    """SVG of the transcript; without the web font that rich links to, so that nothing is fetched."""
    console = Console(record=True, width=80, file=io.StringIO())
    for line in transcript.splitlines():
        console.print(Text(line, style="bold green" if line.startswith("$ ") else ""), soft_wrap=False)
    frame = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="mlxdpo", code_format=frame, unique_id="recording")


if __name__ == "__main__":
    sys.stdout.write(drawing(sys.stdin.read()))
