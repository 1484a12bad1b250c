"""`experiments.inception.evaluate`, by its short name."""

import runpy

if __name__ == "__main__":
    MODULE = "experiments.inception.evaluate"
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
