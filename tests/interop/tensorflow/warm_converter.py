"""lockstep/interop/tensorflow/convert.py for many files: TensorFlow is imported once, each file has a process of its own.

    INTERPRETER warm_converter.py CONVERT.PY

A line of JSON in, {"arguments", "seconds"}, a line out: {"status", "words", "bytes", "seconds"}, the last two what the file's
process took. Run with the interpreter of the converter; it imports nothing of Lockstep.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import traceback


def main() -> None:
    del sys.path[0]
    spec = importlib.util.spec_from_file_location("convert", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import tf2onnx.convert  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as words:
            child = os.fork()
            if child == 0:
                os.dup2(words.fileno(), 1)
                os.dup2(words.fileno(), 2)
                resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"] + 5))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.alarm(10 * request["seconds"])
                status = 1
                try:
                    module.convert(request["arguments"])
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
            _, status, used = os.wait4(child, 0)
            words.seek(0)
            answer = {
                "status": os.waitstatus_to_exitcode(status),
                "words": words.read().decode(errors="replace")[-20_000:],
                "bytes": used.ru_maxrss << 10,
                "seconds": used.ru_utime + used.ru_stime,
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
