"""What `import bn_jax` brings with it."""

import subprocess
import sys

HEAVY = ("flax", "optax", "orbax", "tensorflow_datasets", "matplotlib", "experiments")


def test_the_core_imports_nothing_but_jax():
    program = f"""
import sys, bn_jax
print([name for name in {HEAVY} if name in sys.modules])
import bn_jax.linen
print('flax' in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["[]", "True"]


def test_the_package_can_be_loaded_again():
    program = "import importlib, bn_jax; importlib.reload(bn_jax)"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
