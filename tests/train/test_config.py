import ml_collections
import pytest

from tokjax.errors import UserError
from tokjax.train.config import OptimiserConfig, TrainConfig, default_config


def test_default_config_has_every_field_and_reads_back():
    cfg = default_config(100, ema_decay=0.9, optimiser={"lr": 1e-2})
    assert isinstance(cfg, ml_collections.ConfigDict)
    read = TrainConfig.of(cfg)
    assert (read.total_steps, read.ema_decay, read.optimiser.lr, read.optimiser.b1) == (100, 0.9, 1e-2, 0.9)
    assert TrainConfig.of(read) == read


def test_none_can_be_set_later():
    cfg = default_config(100)
    assert TrainConfig.of(cfg).ema_decay is None
    cfg.ema_decay = 0.99
    assert TrainConfig.of(cfg).ema_decay == 0.99


def test_other_fields_of_an_experiment_are_left_alone():
    assert TrainConfig.of({"total_steps": 5, "model": {"depth": 3}}).total_steps == 5


def test_one_frozen_expression_may_be_a_string():
    assert OptimiserConfig.of({"frozen": "pos_embed"}).frozen == ("pos_embed",)
    assert OptimiserConfig.of({"frozen": ["a", "b"]}).frozen == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total_steps": 0}, "total_steps is 0"),
        ({"total_steps": 1.5}, "total_steps is 1.5"),
        ({"log_every": 0}, "log_every is 0"),
        ({"eval_every": -1}, "eval_every is -1"),
        ({"keep_last": 0}, "keep_last is 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"best_mode": "largest"}, "'largest'.*'max' or 'min'"),
        ({"max_bad_steps": 0}, "max_bad_steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"optimiser": {"lr": 0.0}}, r"optimiser\.lr is 0.0"),
        ({"optimiser": {"lr": float("nan")}}, r"optimiser\.lr is nan"),
        ({"optimiser": {"lr": "0.1"}}, r"optimiser\.lr is '0.1'"),
        ({"optimiser": {"final_lr": -1e-5}}, "final_lr is -1e-05"),
        ({"optimiser": {"b2": 1.0}}, "b2 is 1.0"),
        ({"optimiser": {"eps": 0.0}}, "eps is 0.0"),
        ({"optimiser": {"weight_decay": -0.1}}, "weight_decay is -0.1"),
        ({"optimiser": {"clip_norm": 0.0}}, "clip_norm is 0.0"),
        ({"optimiser": {"accumulate": 0}}, "accumulate is 0"),
        ({"optimiser": {"warmup_fraction": 1.0}}, "warmup_fraction is 1.0"),
        ({"optimiser": {"warmup_steps": 3, "warmup_fraction": 0.1}}, "give one of them"),
        ({"optimiser": {"frozen": ("blocks/(",)}}, r"'blocks/\('"),
        ({"optimiser": {"momentum": 0.9}}, "momentum is not a field; there are lr, "),
    ],
)
def test_bad_values_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        TrainConfig.of({"total_steps": 10} | changes)


def test_total_steps_is_needed():
    with pytest.raises(UserError, match="total_steps is not in the config"):
        TrainConfig.of({})
