from pathlib import Path

import jax
import pytest

from experiments.running.compilation_cache import VARIABLE, use_compilation_cache


@pytest.fixture
def chosen(monkeypatch):
    """What was set of JAX's configuration, which stays as it is."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return found


@pytest.mark.parametrize(
    ("variable", "folder"),
    [("HOME", ".cache/bn_jax/compiled"), ("XDG_CACHE_HOME", "bn_jax/compiled")],
)
def test_programs_lie_in_the_users_folder(
    monkeypatch, tmp_path, chosen, variable, folder
):
    monkeypatch.setenv(variable, str(tmp_path))
    use_compilation_cache()
    (chosen_folder,) = chosen.values()
    assert chosen.keys() == {"jax_compilation_cache_dir"}
    assert Path(chosen_folder).is_dir()
    # One below, for each kind of processor.
    assert Path(chosen_folder).parent == tmp_path / folder


@pytest.mark.parametrize("value", ["", "/elsewhere"])
def test_jaxs_own_variable_comes_first(monkeypatch, tmp_path, chosen, value):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, value)
    use_compilation_cache()
    assert chosen == {}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_no_error(monkeypatch, tmp_path, chosen):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    use_compilation_cache()
    assert chosen == {}
