import importlib.util
import re

import numpy as np
import pytest

from experiments.data.errors import DataError
from experiments.data.preparation import prepare
from experiments.data.prepared import load_prepared
from tests.experiments.data.prepared_sets import encode_png


@pytest.fixture
def make_builder(monkeypatch):
    """Puts a set of one image in TFDS's catalogue; what it takes may fail."""
    import tensorflow_datasets as tfds

    def make(fail=lambda download: None):
        with tfds.core.registered.skip_registration():

            class Tiny(tfds.core.GeneratorBasedBuilder):
                VERSION = tfds.core.Version("1.0.0")
                MANUAL_DOWNLOAD_INSTRUCTIONS = "A file of any name."

                def _info(self):
                    return tfds.core.DatasetInfo(
                        builder=self,
                        features=tfds.features.FeaturesDict(
                            {
                                "image": tfds.features.Image(shape=(2, 3, 3)),
                                "label": tfds.features.ClassLabel(num_classes=2),
                            }
                        ),
                    )

                def _split_generators(self, dl_manager):
                    fail(dl_manager)
                    return {split: self._examples() for split in ("train", "test")}

                def _generate_examples(self):
                    raise NotImplementedError

                def _examples(self):
                    image = encode_png(np.full((2, 3, 3), 7, np.uint8))
                    yield 0, {"image": image, "label": 1}

        monkeypatch.setattr(
            tfds, "builder", lambda name, data_dir: Tiny(data_dir=data_dir)
        )

    return make


def error_of(*arguments):
    with pytest.raises(DataError) as caught:
        prepare(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_any_set_is_prepared_by_its_own_code(make_builder, tmp_path, capsys):
    make_builder()
    prepare("tiny", str(tmp_path), None)
    assert capsys.readouterr().out == f"tiny is prepared in {tmp_path}/tiny/1.0.0\n"
    assert load_prepared("tiny", str(tmp_path)).train_images.max() == 7
    assert list(tmp_path.rglob("tiny-train.array_record-*"))
    prepare("tiny", str(tmp_path), None)
    assert "tiny is already prepared in" in capsys.readouterr().out


def test_missing_tensorflow(make_builder, tmp_path, capsys):
    def fail(_):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    make_builder(fail)
    message = error_of("tiny", str(tmp_path), None)
    assert "'tiny' cannot be prepared here (No module named 'tensorflow')" in message
    assert f"copy it to {tmp_path}" in message
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.rglob("tiny-*"))


def test_failure_of_several_lines(make_builder, tmp_path):
    def fail(_):
        raise RuntimeError("it failed\n  for many\nreasons")

    make_builder(fail)
    message = error_of("tiny", str(tmp_path), None)
    assert "(RuntimeError: it failed for many reasons); mend that" in message


def test_files_downloaded_by_hand(make_builder, tmp_path):
    seen = []
    make_builder(lambda download: seen.append(str(download.manual_dir)))
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "file").touch()
    prepare("tiny", str(tmp_path), str(tmp_path / "manual"))
    assert seen == [str(tmp_path / "manual")]


def test_interruption_is_no_failure(make_builder, tmp_path):
    def fail(_):
        raise KeyboardInterrupt

    make_builder(fail)
    with pytest.raises(KeyboardInterrupt):
        prepare("tiny", str(tmp_path), None)


@pytest.mark.parametrize("name", ["no_such_set", "nosuch/config"])
def test_unknown_set(tmp_path, name):
    message = error_of(name, str(tmp_path), None)
    assert message.startswith(f"data set {name!r} is unknown to TFDS")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is there"
)
def test_registered_imagenet_code_needs_more(tmp_path):
    """The reason for code of our own; when it goes, so may this."""
    (tmp_path / "ILSVRC2012_img_val.tar").touch()
    message = error_of("imagenet2012:5.1.0", str(tmp_path), str(tmp_path))
    assert re.search("No module named 'tensorflow'", message)


def test_imagenet_without_archives(tmp_path):
    assert "--manual_dir" in error_of("imagenet2012", str(tmp_path), None)


def test_imagenet_into_a_bucket(tmp_path):
    message = error_of("imagenet2012", "gs://bucket/sets", str(tmp_path))
    assert "--data_dir=gs://bucket/sets is no folder of this machine" in message
