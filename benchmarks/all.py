"""Runs the benchmarks of performance, one after another, then draws and tabulates.

    python -m benchmarks.all
    python -m benchmarks.all --tensorflow_python=/somewhere/bin/python

On a GPU it is the same command. Flags are handed on to each benchmark.
"""

import subprocess
import sys
import time

from benchmarks import report, results


def main() -> None:
    """Runs all; stops at the first that fails."""
    parser = results.Parser(prog="python -m benchmarks.all", description=__doc__)
    parser.add_argument("--tensorflow_python", help="a Python that has TensorFlow")
    parser.add_argument("--images", help="a folder of JPEGs for the benchmark of input")
    parser.add_argument("--cores", help="as each benchmark's --help says")
    parser.add_argument("--rounds", help="as each benchmark's --help says")
    arguments = parser.parse_args()
    for name in report.PARTS:
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        for flag in ("cores", "rounds"):
            value = getattr(arguments, flag)
            command += [f"--{flag}={value}"] if value else []
        for flag in ("tensorflow_python", "images") if name == "input" else ():
            value = getattr(arguments, flag)
            command += [f"--{flag}={value}"] if value else []
        print(f"\n== {' '.join(command[1:])}", flush=True)
        begin = time.perf_counter()
        subprocess.run(command, check=True)
        print(f"took {time.perf_counter() - begin:.0f} s", flush=True)
    report.main()


if __name__ == "__main__":
    main()
