"""The command line: python -m tokjax.main --config=configs/digits.py --workdir=runs/digits"""

from pathlib import Path
import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from tokjax import tasks
from tokjax.compilation import enable_cache
from tokjax.errors import UserError

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_config(), such as configs/digits.py.")
WORKDIR = flags.DEFINE_string("workdir", "", "Where checkpoints, results and pictures go; runs/NAME by default.")
MODE = flags.DEFINE_enum("mode", None, tasks.MODES, "What to do; the config's mode by default.")
LIST = flags.DEFINE_bool("list", False, "Print every registered reducer and leave.")


def listing() -> str:
    """Every registered reducer with kind, paper, needs, length and knob, as a table."""
    from tokjax.reducers import REGISTRY

    rows = [("name", "kind", "length", "padding", "needs", "knob", "paper")]
    for name, e in sorted(REGISTRY.items()):
        padding, needs = "yes" if e.padding else "no", ", ".join(e.needs) or "nothing"
        rows.append((name, e.kind, e.length, padding, needs, f"{e.knob.field}: {e.knob.range}", e.paper))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r}: not a flag; settings look like --config.data.path=FOLDER")
    if LIST.value:
        print(listing())
        return
    if CONFIG.value is None:
        raise UserError("--config is missing, such as --config=configs/digits.py; --list prints the reducers")
    name = Path(FLAGS["config"].config_filename.partition(":")[0]).stem  # type: ignore[attr-defined]
    workdir = Path(WORKDIR.value or f"runs/{name}")
    command = shlex.join(["python", "-m", "tokjax.main", *sys.argv[1:]])
    enable_cache()
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # checkpoints tell much that is of no use here
    tasks.make(CONFIG.value, workdir, command).run(MODE.value or CONFIG.value.get("mode", "all"))


def run() -> None:
    """Entry point: what a user can mend ends in one line and exit code 2, without a traceback."""
    try:
        argv = _parsed(sys.argv)
        app.run(main, argv=argv, flags_parser=lambda args: args)
    except UserError as error:
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _parsed(argv: list[str]) -> list[str]:
    """Parses flags and config; whatever is wrong with them is the user's to mend."""
    known: tuple[type[Exception], ...] = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)
    try:
        return FLAGS(argv)
    except known as error:
        if isinstance(error, OSError) and error.filename:
            raise UserError(f"--config={error.filename}: {error.strerror}") from error
        raise UserError(str(error)) from error


if __name__ == "__main__":
    run()
