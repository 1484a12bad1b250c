import jax
import numpy as np
import pytest

from experiments.inception.config import (
    FIELDS,
    SIZES,
    VARIANTS,
    get_config,
)
from experiments.inception.experiment import learning_rates
from experiments.inception.training import check_config
from experiments.weights.namings import NAMINGS

ENSEMBLE = [f"ensemble_{number}" for number in range(1, 7)]
BASELINES = ["inception", "inception_x5", "inception_sigmoid", "inception_he"]


def config_of(variant: str) -> dict:
    return get_config(variant).to_dict()


def changes_between(parent: str, variant: str) -> dict:
    """What a variant changes, its own name aside."""
    before, after = config_of(parent), config_of(variant)
    assert before.pop("variant") == parent
    assert after.pop("variant") == variant
    assert before.keys() == after.keys()
    return {key: after[key] for key in after if after[key] != before[key]}


def test_all_of_the_papers_models_are_there():
    assert set(VARIANTS) == {
        *BASELINES,
        *("bn_baseline", "bn_x5", "bn_x30", "bn_x5_sigmoid"),
        *ENSEMBLE,
        *(naming.variant for naming in NAMINGS),
    }


# Section 4.2.2, by hand.
@pytest.mark.parametrize(
    ("parent", "variant", "changes"),
    [
        # Failures need not take as long as what reaches something.
        (
            "inception",
            "inception_x5",
            {"rate_multiple": 5, "num_steps": 6_000_000},
        ),
        (
            "inception",
            "inception_sigmoid",
            {"activation": "sigmoid", "num_steps": 6_000_000},
        ),
        ("inception", "inception_he", {"initialisation": "he"}),
        ("inception", "bn_baseline", {"batch_norm": True}),
        (
            "bn_baseline",
            "bn_x5",
            {
                "rate_multiple": 5,
                "dropout_rate": 0,
                "l2_multiple": 0.2,
                "decay_speed": 6,
                "local_response_norm": False,
                "shuffle": "examples",
                "distortions": "weak",
                "num_steps": 6_000_000,
            },
        ),
        ("bn_x5", "bn_x30", {"rate_multiple": 30}),
        ("bn_x5", "bn_x5_sigmoid", {"activation": "sigmoid"}),
    ],
)
def test_a_variant_differs_from_its_parent_by_what_the_paper_names(
    parent, variant, changes
):
    assert changes_between(parent, variant) == changes


@pytest.mark.parametrize(
    ("variants", "values"),
    [
        (
            ["inception", "inception_sigmoid", "bn_baseline"],
            {"rate": 0.0015, "dropout_rate": 0.4, "local_response_norm": True},
        ),
        (["inception_x5"], {"rate": 0.0075, "dropout_rate": 0.4}),
        (
            ["bn_x5", "bn_x5_sigmoid"],
            {"rate": 0.0075, "dropout_rate": 0, "local_response_norm": False},
        ),
        (["bn_x30"], {"rate": 0.045, "shuffle": "examples", "distortions": "weak"}),
        (ENSEMBLE, {"rate": 0.045, "shuffle": "examples", "distortions": "weak"}),
        (BASELINES, {"batch_norm": False, "shuffle": "shards", "l2": 2e-4}),
        (["bn_baseline"], {"batch_norm": True, "shuffle": "shards", "l2": 2e-4}),
        (["bn_x5", "bn_x30", *ENSEMBLE], {"batch_norm": True, "l2": 4e-5}),
        (["inception", "bn_baseline"], {"distortions": "strong"}),
        (["inception", "inception_he", "bn_baseline"], {"num_steps": 31_000_000}),
        (["bn_x5", "bn_x30", "bn_x5_sigmoid"], {"num_steps": 6_000_000}),
        (["inception_x5", "inception_sigmoid", *ENSEMBLE], {"num_steps": 6_000_000}),
        (["inception_sigmoid", "bn_x5_sigmoid"], {"activation": "sigmoid"}),
        (["inception", "bn_x30", *ENSEMBLE], {"activation": "relu"}),
    ],
)
def test_values_of_the_paper(variants, values):
    for variant in variants:
        config = config_of(variant)
        found = config | {
            "rate": round(config["learning_rate"] * config["rate_multiple"], 12),
            "l2": round(config["l2_weight"] * config["l2_multiple"], 12),
        }
        assert found | values == found, variant


def test_the_defaults_are_the_papers():
    config = config_of("")
    assert config == config_of("inception")
    assert config == {key: field.default for key, field in FIELDS.items()}
    expected = {
        "batch_size": 32,
        "image_size": 224,
        "dataset": "imagenet2012",
        "width": 1,
        "momentum": 0.9,
        "separable_stem": True,
        "pool_projection": 96,
        "auxiliary_head": False,
        "initialisation": "googlenet",
        "gradient_delay": 0,
        "dtype": "float32",
    }
    assert config | expected == config


def test_rates_decay_as_in_googlenet_and_six_times_faster():
    """4% every 8 epochs: of 1,281,167 images, in batches of 32."""
    for variant, factor in (("inception", 1), ("bn_x5", 6), ("bn_x30", 6)):
        config = config_of(variant)
        steps = 8 * 1_281_167 / 32 / factor
        (initial,) = learning_rates(config, np.array([0]))
        for decays in 1, 2, 10:
            for part, passed in ((0.9, decays - 1), (1.1, decays)):
                step = round(steps * (decays - 1 + part))
                expected = initial * 0.96**passed
                (rate,) = learning_rates(config, np.array([step]))
                assert rate == pytest.approx(expected)


def test_the_ensemble_has_six_different_members_based_on_bn_x30():
    """Section 4.2.3: larger weights, dropout of 5 or 10%, per-activation norms."""
    named = {"seed", "initial_scale", "dropout_rate", "per_activation_rows"}
    members = [changes_between("bn_x30", variant) for variant in ENSEMBLE]
    assert {frozenset(member) for member in members} >= {
        frozenset({"seed", key}) for key in named - {"seed"}
    }
    assert len({member["seed"] for member in members}) == 6
    without_seeds = []
    for member in members:
        assert {"seed"} < member.keys() <= named
        assert member.get("initial_scale", 2) > 1
        assert member.get("dropout_rate", 0.1) in (0.05, 0.1)
        assert set(member.get("per_activation_rows", ())) <= {"5a", "5b"}
        without_seeds.append({k: v for k, v in member.items() if k != "seed"})
    for member in without_seeds:
        assert without_seeds.count(member) == 1


@pytest.mark.parametrize("size", ["", *SIZES])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_configuration_is_valid(variant, size, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = config_of(f"{variant},{size}" if size else variant)
    assert config.keys() == FIELDS.keys()
    assert config["variant"] == variant
    check_config(config)


def test_a_size_leaves_what_a_variant_is():
    """A variant differs from its parent by the same keys and values at any size.

    But for the number of steps, and what a size says of all variants.
    """
    for size, (_, changes) in SIZES.items():
        for variant, (parent, _) in VARIANTS.items():
            if not parent:
                continue
            full, sized = (
                {
                    key: (old[key], new[key])
                    for key in old
                    if old[key] != new[key] and key not in ("num_steps", *changes)
                }
                for old, new in (
                    (config_of(parent), config_of(variant)),
                    (config_of(f"{parent},{size}"), config_of(f"{variant},{size}")),
                )
            )
            assert full == sized


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_size_scales_the_schedule_as_a_whole(size, variant):
    """The paper's rates, steps in its proportions, and the same fall of the rate."""
    full, sized = config_of(variant), config_of(f"{variant},{size}")
    share = sized["num_steps"] / full["num_steps"]
    assert share == config_of(f"inception,{size}")["num_steps"] / 31e6
    places = np.linspace(0.05, 0.95, 19)
    expected, found = (
        learning_rates(config, np.round(places * config["num_steps"]))
        for config in (full, sized)
    )
    # Examples a step times steps stay, and so does the rate an example.
    larger = sized["batch_size"] / 32
    # A fall comes a step earlier or later.
    np.testing.assert_allclose(found, larger * expected, rtol=0.0401)
    ends = learning_rates(sized, np.array([0, sized["num_steps"]]))
    end = 0.019 if full["decay_speed"] == 1 else 0.010
    if full["num_steps"] == 31_000_000 or full["decay_speed"] == 6:
        assert ends[1] / ends[0] == pytest.approx(end, rel=0.05)


@pytest.mark.parametrize(
    ("size", "dataset", "expected"),
    [
        ("small", "cluttered_mnist", {"image_size": 64, "width": 0.125}),
        ("large", "cluttered_mnist", {"image_size": 64, "width": 1, "flip": False}),
        ("cifar10", "cifar10", {"image_size": 32, "width": 1, "batch_size": 32}),
        ("tiny_imagenet", "tiny_imagenet", {"min_area": 0.64, "batch_size": 32}),
        ("cifar10_256", "cifar10", {"batch_size": 256, "learning_rate": 0.012}),
        ("tiny_imagenet_256", "tiny_imagenet", {"batch_size": 256, "flip": True}),
    ],
)
def test_sizes(size, dataset, expected):
    for variant in VARIANTS:
        config = config_of(f"{variant},{size}")
        assert config["dataset"] == dataset
        assert config | expected == config
        if dataset != "cluttered_mnist":
            assert config["shuffle"] == "examples"


def test_a_comma_alone_is_a_size():
    assert config_of(",small") == config_of("inception,small")


def test_configurations_do_not_share_state():
    get_config("bn_x5,small").num_steps = 1
    get_config("bn_x5").learning_rate = 1.0
    assert config_of("bn_x5,small")["num_steps"] == 1_200
    assert config_of("bn_x5")["learning_rate"] == 0.0015


@pytest.mark.parametrize("variant", ["bn_x6", "bn_x5,tiny", "small", "bn_x5,small,x"])
def test_unknown_variants(variant):
    with pytest.raises(ValueError, match=f"^unknown variant '{variant}'; ") as caught:
        get_config(variant)
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in VARIANTS)
    assert all(f",{size}" in message for size in SIZES)
