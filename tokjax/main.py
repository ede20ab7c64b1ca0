"""The command line: python -m tokjax.main --config=configs/digits.py --workdir=runs/digits"""

import contextlib
import os
from pathlib import Path
import shlex
import sys
import traceback

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from tokjax import parallel, tasks
from tokjax.errors import UserError

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "A file with get_config(), such as configs/digits.py.")
WORKDIR = flags.DEFINE_string("workdir", "", "Where checkpoints, results and pictures go; runs/NAME by default.")
MODE = flags.DEFINE_enum("mode", None, tasks.MODES, "What to do; the config's mode by default.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT where several processes meet, on process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
POD = flags.DEFINE_bool("pod", False, "Several processes, one on every host of a Cloud TPU slice.")
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
    there = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--workdir={workdir}: {there} is no folder that can be written to")
    command = shlex.join(["python", "-m", "tokjax.main", *sys.argv[1:]])
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # checkpoints tell much that is of no use here
    parallel.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, pod=POD.value)
    with contextlib.ExitStack() as stack:
        if jax.process_index():  # one tells what happens, all tell what is wrong
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        tasks.make(CONFIG.value, workdir, command).run(MODE.value or CONFIG.value.get("mode", "all"))
    parallel.finish()


def run() -> None:
    """Entry point: what a user can mend ends in one line and exit code 2, without a traceback."""
    try:
        argv = _parsed(sys.argv)
        app.run(main, argv=argv, flags_parser=lambda args: args)
    except UserError as error:
        parallel.leave(_fail(error))
    except Exception:
        if not parallel.several():
            raise
        traceback.print_exc()
        parallel.leave(1)


def _fail(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _parsed(argv: list[str]) -> list[str]:
    """Parses flags and config; whatever is wrong with them is the user's to mend."""
    app.define_help_flags()
    try:
        rest = FLAGS(argv)
        if CONFIG.value is not None:
            CONFIG.value.get("task")  # a file that could not be read shows at the first look into the config
        return rest
    except (AttributeError, KeyError) as error:
        if any(frame.name == "get_config" for frame in traceback.extract_tb(error.__traceback__)):
            raise  # a mistake in the file itself, best seen in a traceback
        field = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error.args[0]
        raise UserError(f"the config has no field {'. '.join(str(field).splitlines())}") from error
    except OSError as error:
        reason = str(error).rpartition("failure to load: ")[2].splitlines()[-1].strip()
        raise UserError(f"--config: {reason}") from error
    except (flags.Error, TypeError, ValueError) as error:
        text = str(error).strip()
        if "Traceback" in text:  # get_config refused its argument
            text = f"--config: {text.splitlines()[-1]}"
        raise UserError(text) from error


if __name__ == "__main__":
    run()
