"""Prepares a tensorflow-datasets image set for training, without TensorFlow.

    python -m experiments.prepare imagenet2012 --manual_dir=DIR [--data_dir=DIR]
    python -m experiments.prepare NAME [--data_dir=DIR] [--manual_dir=DIR]
    python -m experiments.prepare NAME --convert_from=DIR [--data_dir=DIR]

ImageNet is made from two archives that image-net.org gives to those who register:
manual_dir must hold ILSVRC2012_img_train.tar (147,897,477,120 bytes) and
ILSVRC2012_img_val.tar (6,744,924,160 bytes). Checked before the work starts: that both
are there, their sizes, that the first consists of the archives of the 1,000 classes,
and the space on the disk (158 GB). Checked at the end: 1,281,167 and 50,000 images.

Any other set is downloaded and prepared by its own code in tensorflow-datasets, which
for many sets needs TensorFlow; the command says so.

The third form copies a set that was prepared as TFRECORD, on all cores; training reads
TFRECORD as it is, too, but array_record files are faster to open.

Sets are prepared in the array_record form. One that is there already is left alone, and
nothing half-written is left where sets are looked for.
"""

from absl import flags

from experiments.configuration.fields import ConfigError
from experiments.running import commands

_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Folder of prepared sets; without it, that of tensorflow-datasets: "
    "$TFDS_DATA_DIR or ~/tensorflow_datasets.",
)
_MANUAL_DIR = flags.DEFINE_string(
    "manual_dir", None, "Folder of the files that had to be downloaded by hand."
)
_CONVERT_FROM = flags.DEFINE_string(
    "convert_from", None, "Folder of prepared sets that holds this one as TFRECORD."
)
_CHECK = flags.DEFINE_enum(
    "check",
    "size",
    ["size", "none"],
    "For imagenet2012, size: archives must have the official sizes, classes and "
    "numbers of images. none: they may hold a part of the classes and images.",
)


def main(arguments: list[str]) -> None:
    """Prepares the set that the arguments name."""
    if len(arguments) != 1:
        raise ConfigError(
            f"got {len(arguments)} names of data sets: expected one, such as "
            "imagenet2012 (see --help)"
        )
    # Imported here so that --help and wrong flags are answered at once.
    if _CONVERT_FROM.value:
        from experiments.data.conversion import convert

        convert(arguments[0], _CONVERT_FROM.value, _DATA_DIR.value)
        return
    from experiments.data.preparation import prepare

    prepare(
        arguments[0],
        _DATA_DIR.value,
        _MANUAL_DIR.value,
        official=_CHECK.value == "size",
    )


if __name__ == "__main__":
    commands.launch_with_arguments(main, __doc__)
