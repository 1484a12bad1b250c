"""Prepares a tensorflow-datasets image set for training, without TensorFlow.

    python -m experiments.prepare imagenet2012 --manual_dir=DIR [--data_dir=DIR]
    python -m experiments.prepare NAME [--data_dir=DIR] [--manual_dir=DIR]
    python -m experiments.prepare NAME --image_dir=DIR [--data_dir=DIR]
    python -m experiments.prepare NAME --convert_from=DIR [--data_dir=DIR]

ImageNet is made from two archives that image-net.org gives to those who register:
manual_dir must hold ILSVRC2012_img_train.tar (147,897,477,120 bytes) and
ILSVRC2012_img_val.tar (6,744,924,160 bytes). Checked before the work starts: that both
are there, their sizes, that the first consists of the archives of the 1,000 classes,
and the space on the disk (158 GB). Checked at the end: 1,281,167 and 50,000 images.

Any other set is downloaded and prepared by its own code in tensorflow-datasets, which
for many sets needs TensorFlow; the command says so.

The third form makes a set called NAME of images of your own, JPEGs and PNGs, on all
cores: DIR has a folder a class, or train and val with such folders. Where there is no
val, a share is held out by a hash of each file's name. An extracted ImageNet is one,
too, with NAME imagenet2012; its validation images may lie in val itself. A report says
what could not be read, which images are copies of others, and how many each class has.
A run that was stopped goes on when started again.

The fourth form copies a set that was prepared as TFRECORD, on all cores; training reads
TFRECORD as it is, too, but array_record files are faster to open.

Sets are prepared in the array_record form. One that is there already is left alone, and
nothing half-written is left where sets are looked for.
"""

from pathlib import Path

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
_IMAGE_DIR = flags.DEFINE_string(
    "image_dir", None, "Folder of images, in a folder a class; see above."
)
_HELD_OUT = flags.DEFINE_float(
    "held_out",
    0.1,
    "Of --image_dir, the share of the images that is held out where there is no val.",
    lower_bound=0,
    upper_bound=1,
)
_LABELS = flags.DEFINE_string(
    "labels",
    None,
    "Of --image_dir, a file with name and class of every image that lies in val itself "
    "(default: for imagenet2012 the official ones).",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "With --image_dir: say what the set would hold, and stop."
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
    if _IMAGE_DIR.value:
        from experiments.data.preparation import prepare_own

        prepare_own(
            arguments[0],
            _IMAGE_DIR.value,
            _DATA_DIR.value,
            held_out=_HELD_OUT.value,
            labels=_LABELS.value and Path(_LABELS.value).expanduser(),
            official=_CHECK.value == "size",
            dry_run=_DRY_RUN.value,
        )
        return
    if _DRY_RUN.value:
        raise ConfigError("--dry_run goes with --image_dir alone; leave it out")
    from experiments.data.preparation import prepare

    prepare(
        arguments[0],
        _DATA_DIR.value,
        _MANUAL_DIR.value,
        official=_CHECK.value == "size",
    )


if __name__ == "__main__":
    commands.launch_with_arguments(main, __doc__)
