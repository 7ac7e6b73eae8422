"""A process in which torch is imported already, and that runs command lines of `python -m mpifl.train` one by one.

It reads a request per line of stdin, {"folder": ..., "arguments": [...], "fork": ...}, runs it in that folder with
stdout and stderr going to files beside the folder, and answers with a line of its own. `fork`: in a process made for
it, which exits as any other does; else in this one. It has little memory and no large files, so that what asks for too
much is told so at once. Whoever asked ends it with SIGABRT when there is no answer: stderr then has where it hung.
"""

import faulthandler
import gc
import json
import os
import resource
import sys
import threading
import traceback

MEMORY, LARGEST_FILE = 6 << 30, 256 << 20


def main():
    import mpifl.train  # noqa: F401 - what the command would import
    from mpifl.command_line import main

    for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, LARGEST_FILE), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    faulthandler.enable(all_threads=False)
    answers, requests = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    print("ready", file=answers, flush=True)
    for number, line in enumerate(requests):
        request = json.loads(line)
        os.chdir(request["folder"])
        output(request["folder"])
        if request["fork"]:
            child = os.fork()
            if not child:
                sys.exit(main(request["arguments"]))
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            ended = run_here(main, request["arguments"])
        if number == 0:  # what it imported stays
            gc.collect()
            gc.freeze()
        if number % 20 == 0:
            gc.collect()
            files = len(os.listdir("/proc/self/fd"))
        print(json.dumps([ended, threading.active_count(), files]), file=answers, flush=True)


def output(folder):
    """Have stdout and stderr go to FOLDER.stdout and FOLDER.stderr."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)


def run_here(main, arguments):
    """The exit status that a process of its own would have; it leaves no path behind."""
    path = list(sys.path)
    try:
        return main(arguments)
    except SystemExit as leave:
        return leave.code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.path[:] = path
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
