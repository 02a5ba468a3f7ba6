"""Tasks as a whole: what a seed decides, what recipes share, and what is refused."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairtrial.contract import BadInput, Choice, Diverged, Pruned
from fairtrial.tasks import SupervisedTask, load, names
from fairtrial.tasks.supervised import Setting
from fairtrial.tasks.trained import TrainedTask


def short(name: str = "digits", **changed: Any) -> SupervisedTask:
    task = load(name)
    assert isinstance(task, SupervisedTask)
    return replace(task, **{"total_steps": 10} | changed)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


SUPERVISED = [name for name in names() if isinstance(load(name), SupervisedTask)]


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_recipe_and_a_seed_give_one_outcome(name: str) -> None:
    task = short(name, total_steps=3)
    first, second, other = (task.run({}, seed, split="test") for seed in (7, 7, 8))
    assert (first.value, first.curve, first.metrics) == (second.value, second.curve, second.metrics)
    assert (first.costs.peak_memory, first.costs.optimizer_state_bytes, first.costs.trainable_parameters) == (
        second.costs.peak_memory,
        second.costs.optimizer_state_bytes,
        second.costs.trainable_parameters,
    )
    assert first.metrics != other.metrics


def test_what_the_program_drew_before_does_not_matter_and_what_it_draws_after_stays() -> None:
    task = short(model=lambda: nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10)))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = task.run({}, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert task.run({}, 0).metrics == first.metrics


def test_recipes_with_one_seed_share_split_initial_weights_and_order() -> None:
    begun: list[list[Tensor]] = []

    class Watched(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            if self.training:
                if len(begun[-1]) == 1:
                    begun[-1].append(weights(self))
                begun[-1].append(input)
            output: Tensor = super().forward(input)
            return output

    def model() -> nn.Module:
        begun.append([torch.zeros(0)])
        return Watched(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))

    task = short(model=model)
    for choices in (
        {},
        {"optimizer": Choice("SGD", {"lr": 0.1})},
        {"optimizer": Choice("FRUGAL")},
        {"loss": Choice("MultiMarginLoss")},
        {"schedule": Choice("OneCycleLR")},
    ):
        task.run(choices, 3)
    for other in begun[1:]:
        assert len(other) == len(begun[0]) == 12
        assert all(torch.equal(a, b) for a, b in zip(begun[0], other, strict=True))


def test_the_curve_and_progress_have_five_points() -> None:
    points: list[tuple[int, int, float]] = []
    outcome = short(total_steps=23).run({}, 0, progress=lambda *point: points.append(point))
    assert [step for step, _, _ in points] == [5, 10, 14, 19, 23]
    assert [(step, value) for step, _, value in points] == list(outcome.curve)
    assert {total for _, total, _ in points} == {23}
    assert outcome.value == outcome.curve[-1][1]


def test_a_pruned_run_ends_at_once() -> None:
    def progress(step: int, total: int, value: float) -> None:
        if step >= 4:
            raise Pruned

    with pytest.raises(Pruned):
        short().run({}, 0, progress=progress)


def test_a_learning_rate_beyond_all_bounds_diverges() -> None:
    for optimizer in ("AdamW", "SGD"):
        with pytest.raises(Diverged):
            short(total_steps=30).run({"optimizer": Choice(optimizer, {"lr": 1e20})}, 0)


def test_outputs_that_are_not_finite_are_no_value() -> None:
    class Late(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * (1.0 if self.training else float("nan"))

    with pytest.raises(Diverged, match="outputs are no longer finite"):
        short(model=lambda: Late(64, 10)).run({}, 0)


def test_the_setting_says_what_methods_need() -> None:
    settings: list[Setting] = []
    task = short()
    slot = task.slots["schedule"]

    def bind(setting: Setting) -> dict[str, Any]:
        settings.append(setting)
        return {"optimizer": setting.optimizer}

    replace(task, slots={**task.slots, "schedule": replace(slot, bind=bind)}).run({}, 0)
    (setting,) = settings
    assert (setting.num_samples, setting.num_classes, setting.total_steps) == (1151, 10, 10)
    assert (setting.steps_per_epoch, setting.batch_size) == (17, 64)
    x, y = (torch.cat(parts) for parts in zip(*setting.score_batches(), strict=True))
    assert x.shape == (1151, 64)
    assert y.shape == (1151,)
    first, again, longer, other = (
        weights(setting.pretrain(fraction, member)) for fraction, member in ((0.2, 0), (0.2, 0), (0.5, 0), (0.2, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, longer)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"optimizer": Choice("AdamW", {"lr": -1.0})}, ValueError, "Invalid learning rate: -1.0"),
        ({"optimizer": Choice("AdamW", {"lr": "fast"})}, TypeError, "not supported between"),
        ({"optimizer": Choice("AdamW", {"rate": 1})}, BadInput, "AdamW has no hyperparameter 'rate'"),
        (
            {"optimiser": Choice("AdamW")},
            BadInput,
            "the task 'digits' has no slot 'optimiser'; it has: optimizer, loss",
        ),
        ({"optimizer": Choice("Nothing")}, BadInput, "no method 'Nothing' here"),
        ({"sampler": Choice("PrunedSampler", {"keep": 2.0})}, ValueError, "keep"),
        (
            {"batch": Choice("DecoupledMixup"), "loss": Choice("ZLoss")},
            BadInput,
            "DecoupledMixup brings a loss of its own, so ZLoss cannot be used with it",
        ),
        ({"batch": Choice("Mixup"), "loss": Choice("MultiMarginLoss")}, BadInput, "the choices do not fit together"),
        ({"loss": Choice("CrossEntropyLoss", {"reduction": "none"})}, BadInput, "no hyperparameter 'reduction'"),
    ],
)
def test_wrong_choices_are_refused_without_training(
    choices: dict[str, Choice], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        short().check(choices)


def test_checking_draws_nothing_from_the_program() -> None:
    state = torch.get_rng_state()
    short().check({"sampler": Choice("PrunedSampler"), "batch": Choice("DecoupledMixup")})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("changed", [{"total_steps": 0}, {"batch_size": 0}, {"scale": "some"}])
def test_tasks_that_cannot_be(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changed))} must be"):
        short(**changed)


def test_runs_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="split must be 'validation' or 'test', got 'train'"):
        short().run({}, 0, split="train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be a whole number of at least 0, got -1"):
        short().run({}, -1)
    with pytest.raises(BadInput, match="no slot 'loss'; it has: optimizer"):
        short(slots={"optimizer": load("digits").slots["optimizer"]}).run({"loss": Choice("ZLoss")}, 0)


def test_slots_that_are_not_for_swapping_are_filled_all_the_same() -> None:
    only = {"optimizer": load("digits").slots["optimizer"]}
    assert short(slots=only).run({}, 0).metrics == short().run({}, 0).metrics
    assert short("tabular-diabetes", slots=only).run({}, 0).metrics == short("tabular-diabetes").run({}, 0).metrics


def test_a_task_names_the_module_that_defines_it() -> None:
    for name in names():
        task = load(name)
        assert isinstance(task, SupervisedTask | TrainedTask)
        assert any(value is task for value in vars(sys.modules[task.source]).values())


def test_the_data_have_a_hash() -> None:
    names = ("digits", "mnist1d", "tabular", "tabular-wine", "tabular-diabetes", "tabular-screening", "text")
    hashes = {name: short(name).data_hash for name in names}
    assert len(set(hashes.values())) == len(names)
    assert {short(name).data_hash for name in ("digits-cnn", "digits-noisy")} == {hashes["digits"]}


@pytest.mark.parametrize(
    ("name", "at_least"), [("digits", 0.95), ("tabular", 0.95), ("tabular-wine", 0.94), ("tabular-diabetes", 0.85)]
)
def test_baselines_are_sensible(name: str, at_least: float) -> None:
    task = load(name)
    sign = task.metric.sign
    assert sign * task.run({}, 0, split="test", progress=lambda *point: None).value >= sign * at_least


def test_the_text_model_cannot_look_ahead() -> None:
    from fairtrial.tasks.text import CONTEXT, ByteTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = ByteTransformer(), torch.randint(256, (2, CONTEXT))
    changed = x.clone()
    changed[:, 40:] = 0
    before, after = (model(tokens).view(2, CONTEXT, 256) for tokens in (x, changed))
    assert torch.allclose(before[:, :40], after[:, :40], atol=1e-6)
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_the_text_parts_share_no_passage() -> None:
    from fairtrial.tasks.text import samples

    data = samples()
    training, test = ({row.numpy().tobytes() for row in part} for part in (data.x, data.x_test))
    assert len(training & test) < 0.01 * len(test)  # rulers of tables and the like
    assert data.num_classes == 256
    assert torch.equal(data.x[:, 1:], data.y[:, :-1])
