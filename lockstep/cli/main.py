"""`lockstep VERB ...`: each verb parses its own arguments and calls one function."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence

from lockstep.core.collector import collector_paused
from lockstep.core.errors import LockstepError, StoppedError, unknown_name

VERBS = {
    "train": ("lockstep.cli.train", "train a policy by a recipe, or resume a run"),
    "eval": ("lockstep.cli.evaluate", "evaluate a run or policy folder with a confidence interval"),
    "play": ("lockstep.cli.play", "record episodes as mp4 or gif"),
    "serve": ("lockstep.cli.serve", "serve a language model (OpenAI, Anthropic) or policies (Open Inference Protocol)"),
    "chat": ("lockstep.cli.chat", "talk to a language model in the terminal"),
    "generate": ("lockstep.cli.generate", "go on from prompts with a language model"),
    "pull": ("lockstep.cli.pull", "fetch a language model into the store"),
    "list": ("lockstep.cli.list_models", "list the models of the store"),
    "show": ("lockstep.cli.show", "tell about a model of the store: architecture, sizes, how it is stored"),
    "convert": ("lockstep.cli.convert", "write a language model as a GGUF file, quantised or not, or as a folder"),
    "rm": ("lockstep.cli.rm", "remove a model from the store"),
    "import": ("lockstep.cli.import_file", "read a network of another framework: ONNX, Caffe, MXNet, CNTK, ..."),
    "caffe": ("lockstep.cli.caffe", "train, test and time networks as Caffe's command line does"),
    "export": ("lockstep.cli.export", "write a policy for another runtime: server, browser, phone; checked against it"),
    "compress": (
        "lockstep.cli.compress",
        "prune, quantise or distil a policy; size, latency and return before and after",
    ),
    "runs": ("lockstep.cli.runs", "list, show, compare and plot runs"),
    "bench": ("lockstep.cli.bench", "measure speed and scores beside other libraries"),
    "doctor": ("lockstep.cli.doctor", "check an environment or a language task before training on it"),
    "quickstart": ("lockstep.cli.quickstart", "train, plot, serve and query a first policy"),
}


OTHERS = {"run": "chat", "ls": "list", "delete": "rm", "download": "pull", "launch": "serve", "evaluate": "eval"}
"""What other programs call a verb -> what it is called here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (2 for a user's error, which is told in one paragraph)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        print(importlib.import_module("lockstep").__version__)
        return 0
    verb, rest = args[0], args[1:]
    # A console script's path lacks the working directory, where a user's environment by import path usually lies.
    if "" not in sys.path:
        sys.path.append("")
    if verb not in VERBS:
        near = f"unknown command {verb!r}; did you mean {OTHERS[verb]!r}?" if verb in OTHERS else ""
        print(f"lockstep: {near or unknown_name('command', verb, VERBS)}", file=sys.stderr)
        return 2
    try:
        with collector_paused():
            module = importlib.import_module(VERBS[verb][0])
        status: int = module.main(rest)
        return status
    except StoppedError as error:
        print(f"lockstep {verb}: {error}", file=sys.stderr)
        return 130
    except LockstepError as error:
        _tell(verb, error)
        return 2
    except KeyboardInterrupt as error:
        print(file=sys.stderr)
        _tell(verb, error, "interrupted")
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _tell(verb, error)  # a file to write: --json, --out, --plot; or a disk that is full
        return 2


def _tell(verb: str, error: BaseException, what: str = "") -> None:
    """The error in a paragraph, and what was noted beside it on the way."""
    notes: list[str] = error.__dict__.get("__notes__", [])
    print("\n".join([f"lockstep {verb}: {what or error}", *notes]), file=sys.stderr)


def _usage() -> str:
    lines = [
        "usage: lockstep COMMAND ...",
        "",
        "Train reinforcement-learning policies and language models, and serve them.",
        "",
    ]
    lines += [f"  {verb:<11} {summary}" for verb, (_, summary) in VERBS.items()]
    return "\n".join([*lines, "", "lockstep COMMAND --help tells more."])


if __name__ == "__main__":
    sys.exit(main())
