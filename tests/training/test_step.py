"""One optimizer step: its gradient, its update, its learning rate; the same trajectory however a window is cut."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from compilers import compiling
from mlx.utils import tree_flatten, tree_map
from slow_cases import rest_slow
from tiny_models import tiny_model
from tiny_runs import finish, losses, recipe

from mlxdpo.config import LoraConfig, LossConfig, OptimConfig
from mlxdpo.data.batching import collate
from mlxdpo.forward.logprobs import score_pairs
from mlxdpo.losses import LOSSES, resolve
from mlxdpo.model.adapters import attach_lora
from mlxdpo.training import plan, step
from mlxdpo.training.step import OPTIMIZERS, TAKES, make_gradient, make_optimizer, make_update, step_statistics
from mlxdpo.types import Example, Extras, UserError

COUNT = 7


@pytest.fixture
def model():
    """An adapter that has already moved, so that no gradient is zero by construction."""
    built = attach_lora(tiny_model(), LoraConfig(rank=2, scale=1.0, keys=["self_attn.q_proj", "mlp.up_proj"]))
    noise = {n: mx.random.normal(a.shape) * 0.1 for n, a in tree_flatten(built.trainable_parameters())}
    built.load_weights(list(noise.items()), strict=False)
    return built


@pytest.fixture(scope="module")
def data():
    draw = np.random.default_rng(2)
    ids = lambda: draw.integers(1, 300, draw.integers(2, 14)).astype(np.int32)  # noqa: E731
    thumb = lambda i: Extras(desirable=float(i % 3 > 0))  # noqa: E731
    examples = [Example(ids(), ids(), ids(), f"row {i}", thumb(i)) for i in range(COUNT)]
    return examples, draw.normal(-60, 3, (COUNT, 2)).astype(np.float32)


def loss_of(name):
    return resolve(LossConfig(name=name, **({"beta": 0.2} if "beta" in LOSSES[name].knobs else {})))


def all_pairs(model, data):
    examples, ref = data
    return score_pairs(model, collate(examples, range(COUNT), COUNT, ref))


def mean_loss(model, data, name="sigmoid", seen=None):
    """The mean over all pairs, in one batch, without weights or shares."""
    return loss_of(name)(all_pairs(model, data), seen).mean()


def window_gradient(model, data, size, name="sigmoid"):
    examples, ref = data
    loss, total, losses = loss_of(name), None, []
    gradient = make_gradient(model, loss)
    cuts = [tuple(range(at, min(at + size, COUNT))) for at in range(0, COUNT, size)]
    batches = [collate(examples, indices, size, ref) for indices in cuts]
    rows = [[examples[i] for i in indices] for indices in cuts]
    seen = step_statistics(loss, rows, batches, step.make_scorer(model))
    for indices, batch, row in zip(cuts, batches, seen, strict=True):
        result = gradient(batch, mx.array(1 / COUNT), row)
        total = step.add(total, result.gradients)
        losses += result.losses[: len(indices)].tolist()
    return dict(tree_flatten(total)), sum(losses) / COUNT


# In parts of which the last is smaller, and in one part with filler; pair by pair for one objective of each kind.
WINDOWS = [*((name, size) for name in sorted(LOSSES) for size in (3, 10)), *((n, 1) for n in ("sigmoid", "kto", "aot"))]


@pytest.mark.parametrize(("name", "size"), WINDOWS)
def test_windows_gradient_is_that_of_the_mean_loss(model, data, size, name):
    """Also of objectives that sort, or take means, over all pairs of a step: cutting it changes nothing."""
    value, plain = nn.value_and_grad(model, lambda m: mean_loss(m, data, name))(model)
    got, loss = window_gradient(model, data, size, name)
    assert loss == pytest.approx(value.item(), rel=1e-5)
    for name, want in tree_flatten(plain):
        scale = mx.abs(want).max().item()
        assert scale > 0 and mx.abs(got[name] - want).max().item() < 1e-4 * scale, name


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradient_equals_finite_differences(model, data, name):
    got, _ = window_gradient(model, data, 2, name)
    start = dict(tree_flatten(model.trainable_parameters()))
    draw = np.random.default_rng(0)
    # KTO's z and wDPO's weights have no gradient: they are those of the start in every direction.
    detached = name == "wdpo" or not LOSSES[name].paired
    seen = loss_of(name).step_statistics(all_pairs(model, data)) if detached else None
    for _ in range(2):
        direction = {n: mx.array(draw.normal(size=a.shape).astype("f")) for n, a in start.items()}
        values = []
        for sign in (1, -1):
            model.load_weights([(n, a + sign * 2e-3 * direction[n]) for n, a in start.items()], strict=False)
            values.append(mean_loss(model, data, name, seen).item())
        model.load_weights(list(start.items()), strict=False)
        slope = sum((got[n] * direction[n]).sum().item() for n in start)
        size = math.sqrt(sum((g * g).sum().item() for g in got.values()))
        assert (values[0] - values[1]) / 4e-3 == pytest.approx(slope, rel=0.02, abs=0.02 * size)


def trajectory(folder, cache, monkeypatch, size, accumulate, **sections):
    """Losses and adapter of a run with a reference of its own."""
    out = f"run-{size}x{accumulate}"
    monkeypatch.setenv("MLXDPO_CACHE", str(cache / out))
    train = {"batch_size": size, "gradient_accumulation": accumulate}
    events = finish(recipe(folder, out, train=train, **sections))
    steps = [event.values for event in events if event.kind == "step"]
    return steps, mx.load(str(folder / out / "adapter" / "adapters.safetensors"))


@pytest.mark.parametrize(
    ("method", "optimizer"),
    rest_slow(
        [("lora", "sgd"), ("dora", "sgd"), ("full", "sgd"), ("lora", "adamw")], [("dora", "sgd"), ("lora", "adamw")]
    ),
)
def test_batch_times_accumulation_walks_one_trajectory(tmp_path, cache, monkeypatch, method, optimizer):
    """18 pairs in windows of 8: the last window holds 2, so 8 x 1 fills it with 6 pairs of weight 0."""
    optim = {"sgd": {"name": "sgd", "lr": 1e-2}, "adamw": {"name": "adamw", "lr": 1e-3}}[optimizer]
    sections = {"lora": {"method": method}, "optim": optim}
    steps, adapter = trajectory(tmp_path, cache, monkeypatch, 8, 1, **sections)
    assert len(steps) == 3 and steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(s["rewards/margins"]) for s in steps) > 0.01  # it went somewhere
    for size, accumulate in ((2, 4), (1, 8)):
        others, other = trajectory(tmp_path, cache, monkeypatch, size, accumulate, **sections)
        for a, b in zip(steps, others, strict=True):
            for name in ("loss", "grad_norm", "rewards/margins", "rewards/chosen", "logps/rejected"):
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
            assert (a["num_tokens"], a["epoch"], a["learning_rate"]) == (
                b["num_tokens"],
                b["epoch"],
                b["learning_rate"],
            )
        far = max(mx.abs(adapter[name] - other[name]).max().item() for name in adapter)
        # Adam divides by the gradient's own size, which makes rounding visible where a gradient is near zero.
        assert far < (1e-6 if optimizer == "sgd" else 2e-4)


def test_an_epoch_and_a_half_goes_on_in_the_next_order(tmp_path, cache):
    steps = [e for e in finish(recipe(tmp_path, train={"epochs": 1.5})) if e.kind == "step"]
    assert len(steps) == 8 and steps[-1].values["epoch"] == pytest.approx(8 / 5)
    assert len(losses(finish(recipe(tmp_path, "short", train={"epochs": 0.01})))) == 1


def test_filler_changes_neither_gradient_nor_metrics(model, data):
    examples, ref = data
    gradient = make_gradient(model, resolve(LossConfig(beta=0.2)))
    full, wide = (gradient(collate(examples, (3, 1), size, ref), mx.array(0.5)) for size in (2, 5))
    for (name, a), (_, b) in zip(tree_flatten(full.gradients), tree_flatten(wide.gradients), strict=True):
        assert mx.abs(a - b).max().item() < 1e-4 * mx.abs(a).max().item(), name
    assert step.scored_pairs(wide.losses, wide.pairs, 2).losses == pytest.approx(full.losses.tolist(), rel=1e-5)
    assert len(step.scored_pairs(wide.losses, wide.pairs, 2).chosen) == 2


@compiling
def test_compiled_equals_uncompiled(tmp_path, cache, monkeypatch):
    results = []
    for name, compiled in (("compiled", mx.compile), ("plain", lambda function, **options: function)):
        monkeypatch.setattr(step, "compiled", compiled)
        events = finish(recipe(tmp_path, name, lora={"dropout": 0.1}))
        results.append((losses(events), mx.load(str(tmp_path / name / "adapter" / "adapters.safetensors"))))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert all(mx.abs(results[0][1][n] - results[1][1][n]).max().item() < 1e-4 for n in results[0][1])


def test_clipping_scales_the_whole_gradient_to_the_limit(tmp_path, cache):
    def moved(out, clip):
        steps = [
            e.values for e in finish(recipe(tmp_path, out, optim=plain | {"max_grad_norm": clip}, train={"steps": 1}))
        ]
        return next(s["grad_norm"] for s in steps if "grad_norm" in s), arrays(out)

    def arrays(out):
        return mx.load(str(tmp_path / out / "adapter" / "adapters.safetensors"))

    plain = {"name": "sgd", "lr": 0.1, "warmup": 0}
    norm, free = moved("free", 0.0)
    _, loose = moved("loose", norm * 2)
    _, tight = moved("tight", norm / 4)
    b = [name for name in free if name.endswith("lora_b")]  # they start at zero: what they hold is the update
    length = lambda run: math.sqrt(sum((run[n] ** 2).sum().item() for n in b))  # noqa: E731
    assert length(free) == pytest.approx(0.1 * norm, rel=1e-4)  # at the start only lora_b has a gradient
    assert length(tight) == pytest.approx(0.1 * norm / 4, rel=1e-4)
    assert all(mx.array_equal(free[n], loose[n]).item() for n in free)
    assert all(mx.abs(free[n] / 4 - tight[n]).max().item() < 1e-6 for n in b)


def test_gradient_norm_is_the_global_one_in_float32():
    tree = {"a": mx.array([3.0]), "b": [{"c": mx.array([[4.0], [12.0]]).astype(mx.float16)}]}
    norm = step.gradient_norm(tree)
    assert norm.item() == 13.0 and norm.dtype == mx.float32


class Vector(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.w = mx.array(values)


def walk(config, gradients, rates, start=((0.5, -1.0), (2.0, 0.25))):
    """The weights after updates by given gradients at given rates."""
    model, optimizer = Vector(start), make_optimizer(config)
    update = make_update(model, optimizer)
    for gradient, rate in zip(gradients, rates, strict=True):
        update({"w": mx.array(gradient)}, 1.0, rate)
    return np.array(model.w, np.float64)


GRADIENTS = [((0.3, -0.2), (0.0, 1.0)), ((0.1, 0.4), (-0.5, 1.0)), ((-2.0, 0.4), (0.2, 1e-4))]
RATES = [0.1, 0.05, 0.2]


def test_sgd_equals_its_formula():
    """w <- w - lr (g + decay w)."""
    w = np.array(((0.5, -1.0), (2.0, 0.25)))
    for g, lr in zip(GRADIENTS, RATES, strict=True):
        w = w - lr * (np.array(g) + 0.01 * w)
    got = walk(OptimConfig(name="sgd", weight_decay=0.01), GRADIENTS, RATES)
    assert got == pytest.approx(w, rel=1e-6)


@pytest.mark.parametrize(("name", "decay"), [("adamw", 0.1), ("adamw", 0.0), ("adam", 0.0)])
def test_adamw_equals_its_formula_with_bias_correction(name, decay):
    """Algorithm 2 of arXiv 1711.05101 with the schedule's rate on the decay too, as torch's AdamW has it."""
    w, m, v, (b1, b2) = np.array(((0.5, -1.0), (2.0, 0.25))), 0.0, 0.0, (0.8, 0.95)
    for t, (g, lr) in enumerate(zip(GRADIENTS, RATES, strict=True), 1):
        g = np.array(g)
        w = w * (1 - lr * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    got = walk(OptimConfig(name=name, betas=(b1, b2), weight_decay=decay), GRADIENTS, RATES)
    assert got == pytest.approx(w, rel=1e-5)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_goes_downhill(name):
    """On a bowl around 0 from (2, -2), (1, 3): the distance shrinks at least by a third in 60 steps."""
    model = Vector(((2.0, -2.0), (1.0, 3.0)))
    update = make_update(model, make_optimizer(OptimConfig(name=name)))
    for _ in range(60):
        update(tree_map(lambda w: w, model.trainable_parameters()), 1.0, 0.05)
    assert math.sqrt((model.w**2).sum().item()) < math.sqrt(18) * 2 / 3


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_uses_each_rate_it_is_given(name):
    """Learning rates enter the compiled update as arrays: rate 0 moves nothing, also after other rates."""
    model = Vector(((2.0, -2.0), (1.0, 3.0)))
    update = make_update(model, make_optimizer(OptimConfig(name=name)))
    update({"w": mx.ones((2, 2))}, 1.0, 0.1)
    before = model.w.tolist()
    update({"w": mx.ones((2, 2))}, 1.0, 0.0)
    assert model.w.tolist() == before
    update({"w": mx.ones((2, 2))}, 1.0, 0.1)
    assert model.w.tolist() != before


VALUES = {"weight_decay": (0.1, "0.1"), "betas": ((0.5, 0.9), r"\(0.5, 0.9\)")}


@pytest.mark.parametrize("knob", sorted(TAKES))
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_knobs_act_or_are_refused(name, knob):
    value, shown = VALUES[knob]
    config = OptimConfig(name=name, **{knob: value})
    if name not in TAKES[knob]:
        takers = ", ".join(sorted(TAKES[knob]))
        with pytest.raises(UserError, match=rf"^optim.{knob} {shown} has no effect on {name}; it is for {takers}$"):
            make_optimizer(config)
        return
    gradients = [((1.0, -0.2), (0.1, 1.0)), ((-0.05, 0.15), (-0.1, -0.9)), ((-0.2, 0.1), (0.3, 0.3))]
    gap = np.abs(walk(config, gradients, RATES) - walk(OptimConfig(name=name), gradients, RATES))
    assert gap.max() > 1e-3


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match=r"^optim.name `adamW` is unknown; known: adamw, adam, sgd, rmsprop, lion"):
        make_optimizer(OptimConfig(name="adamW"))


@pytest.mark.parametrize(
    ("optim", "golden"),
    [
        ({"schedule": "constant", "warmup": 0}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 0}, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"schedule": "linear", "warmup": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
        ({"schedule": "linear", "warmup": 0.25}, [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        # (1 + cos(pi k / 8)) / 2
        ({"warmup": 0}, [1, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.0380602]),
        # four steps of warm-up, then (1 + cos(pi k / 4)) / 2
        ({"warmup": 4}, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 0.8535534, 0.5, 0.1464466]),
        ({"warmup": 100}, [n / 101 for n in range(1, 9)]),
    ],
)
def test_learning_rates(optim, golden):
    config = OptimConfig(lr=2e-4, **optim)
    assert [plan.learning_rate(config, n, 8) for n in range(8)] == pytest.approx([2e-4 * g for g in golden], rel=1e-6)


def test_the_schedule_reaches_the_weights(tmp_path, cache):
    config = recipe(tmp_path, optim={"name": "sgd", "lr": 0.1, "schedule": "linear", "warmup": 2, "max_grad_norm": 0.0})
    rates = [e.values["learning_rate"] for e in finish(config) if e.kind == "step"]
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.2 / 3, 0.1 / 3])
    first = mx.load(str(tmp_path / "run" / "checkpoints" / "step-000002" / "adapters.safetensors"))
    assert any(a.any().item() for n, a in first.items() if n.endswith("lora_b"))


def dropout_seeds(monkeypatch, config):
    """What the noise of every batch was drawn from."""
    seeds, plant = [], mx.random.seed
    with monkeypatch.context() as patch:
        patch.setattr(mx.random, "seed", lambda seed: seeds.append(seed) or plant(seed))
        steps = len(losses(finish(config)))
    return seeds[-2 * steps :]


def test_dropout_is_drawn_anew_for_every_batch_from_the_seed_alone(tmp_path, cache, monkeypatch):
    batches = {"batch_size": 3, "gradient_accumulation": 2, "epochs": 2}  # 18 pairs: 6 steps of 2 batches
    first = dropout_seeds(monkeypatch, recipe(tmp_path, "a", train=batches))
    assert len(set(first)) == len(first) == 12
    assert dropout_seeds(monkeypatch, recipe(tmp_path, "b", train=batches)) == first
    assert not set(first) & set(dropout_seeds(monkeypatch, recipe(tmp_path, "c", train=batches | {"seed": 1})))


def test_dropout_acts_in_training_and_never_in_evaluation(tmp_path, cache):
    sections = {"data": {"eval_fraction": 0.4}, "train": {"eval_every": 1}}
    wet, dry = (
        [e for e in finish(recipe(tmp_path, f"run-{p}", lora={"dropout": p}, **sections)) if e.kind in ("step", "eval")]
        for p in (0.5, 0.0)
    )
    # At step 1 the adapter is still nothing whatever is dropped; only its gradient is another.
    assert wet[1].values["loss"] == dry[1].values["loss"] and wet[0].values == dry[0].values
    assert abs(wet[1].values["grad_norm"] - dry[1].values["grad_norm"]) > 0.01
    # A step's loss is taken before its update: it is noisy, and what is measured after it is not.
    saved = tmp_path / "run-0.5" / "adapter"
    again = finish(recipe(tmp_path, "again", model={"adapter": str(saved)}, lora={"dropout": 0.5}, **sections))
    start = next(e.values for e in again if e.kind == "eval")
    assert start["eval_logps/chosen"] == pytest.approx(wet[-1].values["eval_logps/chosen"], abs=1e-4)
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
