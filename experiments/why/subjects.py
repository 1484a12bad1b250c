"""The networks that landscape and shift look at while they train."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.configuration.fields import as_tuple
from experiments.mnist.experiment import Replicas, make_replicas
from experiments.why.data import NUM_DIGITS, Data, compose_digits, first
from experiments.why.networks import WITHOUT, Model, inception, mlp
from experiments.why.part import Config, Setting
from experiments.why.training import Examples, States, train


class Subject(NamedTuple):
    """Networks side by side, and how they train and are looked at."""

    models: Mapping[str, Model]
    replicas: Replicas  # seeds, of one rate
    examples: Examples
    probe: Examples  # the batch that is measured on
    num_steps: int
    batch_size: int
    looks: Sequence[int]  # steps


def settings(config: Config) -> list[dict[str, Any]]:
    """Each network at each of its rates."""
    rates = {
        "mnist": as_tuple(config["learning_rates"]),
        "inception": (config["inception_rate"],),
    }
    return [
        {"network": network, "learning_rate": rate}
        for network in as_tuple(config["networks"])
        for rate in rates[network]
    ]


def describe(setting: Setting) -> str:
    """A setting in words."""
    network = {"mnist": "MNIST network", "inception": "small Inception"}
    return f"{network[setting['network']]}, rate {setting['learning_rate']:g}"


def make(config: Config, data: Data, setting: Setting) -> Subject:
    """What a setting describes."""
    replicas = make_replicas({**config, "learning_rate": setting["learning_rate"]})
    norm = {"decay": config["decay"], "epsilon": config["epsilon"]}
    if setting["network"] == "inception":
        # The first seed: it costs as much as all of the small networks' do.
        replicas = Replicas(*(values[:1] for values in replicas))
        examples = compose_digits(config)
        batch_size, num_steps = (
            config["inception_batch_size"],
            config["inception_steps"],
        )
        models = {
            name: inception(
                NUM_DIGITS,
                batch_norm=name != WITHOUT,
                width=config["inception_width"],
                **norm,
            )
            for name in (WITHOUT, "batch_norm")
        }
        probe, num_looks = first(examples, batch_size), config["inception_looks"]
    else:
        examples, probe = data.training, first(data.training, config["probe_examples"])
        batch_size, num_steps = config["batch_size"], config["num_steps"]
        models = {
            name: mnist_network(config, data, normalisation=name)
            for name in (WITHOUT, "batch_norm", "noisy")
        }
        num_looks = config["num_looks"]
    looks = looks_of(num_steps, num_looks)
    return Subject(models, replicas, examples, probe, num_steps, batch_size, looks)


def train_and_look(subject: Subject, look: Callable[[int, States], None]) -> None:
    """Trains a subject's networks, and looks at them at its steps."""
    train(
        subject.models,
        subject.replicas,
        subject.examples,
        num_steps=subject.num_steps,
        batch_size=subject.batch_size,
        look=look,
        looks=subject.looks,
    )


def mnist_network(config: Config, data: Data, **options: Any) -> Model:
    """The network of section 4.1 as a configuration has it, with options of `mlp`."""
    return mlp(
        data.num_inputs,
        as_tuple(config["hidden"]),
        data.num_classes,
        decay=config["decay"],
        epsilon=config["epsilon"],
        **options,
    )


def looks_of(num_steps: int, num_looks: int) -> list[int]:
    """Steps after which to look: the first, the last and others evenly between."""
    return sorted({round(num_steps * i / num_looks) for i in range(num_looks + 1)})
