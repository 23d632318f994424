"""Optimizers of matrices against their definitions, written out per sample in float64."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from flows import Composite, Flow, SplineCoupling
from flows.distributions import Normal
from flows.nets import MADE, MLP, ConvNet, randomize
from flows.optim import SENG, NGPlus, ProxProp, param_groups_for
from flows.optim.layers import BUDGET, matrix_layers
from flows.recipes import Glow, MaskedSplineFlow, RotationSplineFlow

OPTIMIZERS = {"NG+": NGPlus, "ProxProp": ProxProp, "SENG": SENG}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Convolutions(nn.Module):
    """Convolutions of all kinds, then linear layers, one of which is called twice."""

    def __init__(self):
        super().__init__()
        self.strided = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=1)
        self.same = nn.Conv2d(3, 4, (1, 4), padding="same", dilation=(1, 2), bias=False)
        self.one = nn.Conv2d(4, 3, 1)
        self.line = nn.Conv1d(3, 2, 3, padding=1)
        self.linear = nn.Linear(5, 4)
        self.twice = nn.Linear(4, 4)

    def forward(self, x):
        x = self.one(torch.tanh(self.same(torch.tanh(self.strided(x)))))
        x = torch.tanh(self.line(x.flatten(2)))
        x = torch.tanh(self.linear(x[..., :5]))
        return torch.tanh(self.twice(self.twice(x))).flatten(1)


def sum_of_squares(model, x):
    return model(x).square().sum(1)


def per_sample_matrices(model, loss, x):
    """G_b of every layer by torch.func, {name: (batch, o, columns)}, and their mean."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters, x):
        class Lent:
            def __call__(self, inputs):
                return functional_call(model, parameters, (inputs,))

        return loss(Lent(), x[None]).sum()

    found = vmap(grad(one), (None, 0), randomness="different")(parameters, x)
    matrices = {}
    for layer in matrix_layers(model):
        matrix = found[f"{layer.name}.weight"].flatten(2)
        if layer.bias is not None:
            matrix = torch.cat([matrix, found[f"{layer.name}.bias"].unsqueeze(-1)], dim=2)
        matrices[layer.name] = matrix
    return matrices


def randomized(model):
    """All layers at random, so that none has gradients of zero."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.double()


def images(batch=7):
    return torch.randn(batch, 2, 5, 6, dtype=torch.float64)


MODELS = {
    "convolutions": (Convolutions, images),
    "positions": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten()),
        lambda batch=7: torch.randn(batch, 5, 3, dtype=torch.float64),
    ),
    "MLP": (
        lambda: MLP(3, 4, hidden_features=6),
        lambda batch=7: torch.randn(batch, 3, dtype=torch.float64),
    ),
    "masked": (
        lambda: nn.Sequential(MADE(3, 2, hidden_features=6), nn.Flatten()),
        lambda batch=7: torch.randn(batch, 3, dtype=torch.float64),
    ),
    "ConvNet": (
        lambda: nn.Sequential(ConvNet(2, 3, hidden_features=5), nn.Flatten()),
        images,
    ),
}
each_model = pytest.mark.parametrize("make_model, make_inputs", MODELS.values(), ids=MODELS)


@each_model
@pytest.mark.parametrize("budget", [1, BUDGET], ids=["one sample at a time", "whole batch"])
def test_ngplus_measures_the_second_moment_of_per_sample_gradients(
    make_model, make_inputs, budget, monkeypatch
):
    monkeypatch.setattr("flows.optim.statistics.BUDGET", budget)
    model, x = randomized(make_model()), make_inputs()
    matrices = per_sample_matrices(model, sum_of_squares, x)
    optimizer = NGPlus(model)
    sum_of_squares(model, x).mean().backward()
    optimizer.step()
    found = optimizer.curvature()
    assert found.keys() == matrices.keys() and len(found) > 1
    for name, matrix in matrices.items():
        exact = (matrix @ matrix.mT).mean(0)
        assert (found[name] - exact).abs().max() <= 1e-10 * exact.abs().max()


def test_ngplus_counts_a_log_det_of_the_weight_as_part_of_every_sample():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x)

    model = randomized(Dense())
    x = torch.randn(9, 4, dtype=torch.float64)

    def loss(inputs, weight):
        outputs = functional.linear(inputs, weight, model.linear.bias)
        return 0.5 * outputs.square().sum(1) - weight.slogdet().logabsdet

    weight = model.linear.weight.detach()
    exact = vmap(grad(lambda w, row: loss(row[None], w)[0]), (None, 0))(weight, x)
    bias_gradients = model(x).detach().unsqueeze(-1)
    matrices = torch.cat([exact, bias_gradients], dim=2)
    optimizer = NGPlus(model)
    logabsdet = model.linear.weight.slogdet().logabsdet
    (0.5 * model(x).square().sum(1) - logabsdet).mean().backward()
    optimizer.step()
    torch.testing.assert_close(
        optimizer.curvature()["linear"], (matrices @ matrices.mT).mean(0), rtol=1e-10, atol=0
    )


def test_ngplus_steps_along_the_damped_natural_gradient():
    model, x = randomized(MLP(3, 2, hidden_features=5)), torch.randn(8, 3).double()
    matrices = per_sample_matrices(model, sum_of_squares, x)
    before = copy.deepcopy(model.state_dict())
    optimizer = NGPlus(model, lr=0.1, momentum=0.0, damping=0.04, weight_decay=0.5)
    sum_of_squares(model, x).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for layer in matrix_layers(model):
        matrix = matrices[layer.name]
        damped = (matrix @ matrix.mT).mean(0) + 0.2 * torch.eye(layer.rows).double()
        direction = torch.linalg.solve(damped, matrix.mean(0))
        # Weights decay, biases do not.
        for name, step, decay in [
            ("weight", direction[:, :-1], 0.5),
            ("bias", direction[:, -1], 0.0),
        ]:
            old = before[f"{layer.name}.{name}"]
            new = getattr(layer.module, name).detach()
            torch.testing.assert_close(new, old * (1 - 0.1 * decay) - 0.1 * step)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])


def test_momentum_and_curvature_average_over_the_steps():
    torch.manual_seed(3)
    model = randomized(nn.Sequential(nn.Linear(3, 2)))
    optimizer = NGPlus(model, lr=0.1, momentum=0.5, curvature_decay=0.25, damping=0.01)
    weight = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    weight = torch.cat([weight[0], weight[1].unsqueeze(1)], dim=1)
    moment, buffer = None, 0.0
    for step in range(7):
        x = torch.randn(6, 3).double()
        columns = torch.cat([x, torch.ones(6, 1).double()], dim=1)
        outputs = columns @ weight.mT
        matrices = 2 * outputs.unsqueeze(2) * columns.unsqueeze(1)
        # The early refreshes: steps 0, 1, 2, 3, 4, 6, ...
        if step != 5:
            new = (matrices @ matrices.mT).mean(0)
            moment = new if moment is None else 0.25 * moment + 0.75 * new
        direction = torch.linalg.solve(moment + 0.1 * torch.eye(2).double(), matrices.mean(0))
        buffer = 0.5 * buffer + direction
        weight = weight - 0.1 * buffer
        optimizer.zero_grad()
        sum_of_squares(model, x).mean().backward()
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), weight[:, :-1])
    torch.testing.assert_close(model[0].bias.detach(), weight[:, -1])


@pytest.mark.parametrize("splits", [(3, 3, 3), (5, 4)], ids=str)
def test_ngplus_over_accumulated_passes_is_that_of_all_samples(splits):
    model, x = randomized(Convolutions()), images(9)
    # Passes of unequal size weigh their samples unequally, in the gradient as well.
    weights = torch.cat([torch.full((n,), 9 / (len(splits) * n)) for n in splits]).double()
    matrices = per_sample_matrices(model, sum_of_squares, x)
    optimizer = NGPlus(model)
    for part in x.split(splits):
        (sum_of_squares(model, part).mean() / len(splits)).backward()
    optimizer.step()
    for name, moment in optimizer.curvature().items():
        # The samples' own losses: the mean over all samples, whatever the passes.
        exact = (matrices[name] @ matrices[name].mT).mean(0)
        torch.testing.assert_close(moment, exact, rtol=1e-10, atol=1e-12)
        mean = (weights[:, None, None] * matrices[name]).mean(0)
        layer = next(layer for layer in matrix_layers(model) if layer.name == name)
        torch.testing.assert_close(layer.gradient(), mean)


def coupling_flow(memory, net=None):
    net = net or (lambda i, o: MLP(i, o, hidden_features=8))
    layers = [SplineCoupling(4, net, bins=4, flip=k % 2 == 1) for k in range(3)]
    return Flow(Composite(layers, memory=memory), Normal(4))


@pytest.mark.parametrize("make", [NGPlus, ProxProp, SENG])
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_repeated_passes_count_once(make, memory):
    x = torch.randn(10, 4, dtype=torch.float64)
    steps = []
    for kind in ("store", memory):
        torch.manual_seed(0)
        flow = randomized(coupling_flow(kind))
        optimizer = make(flow, lr=0.1)
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
        steps.append(torch.nn.utils.parameters_to_vector(flow.parameters()).detach())
    torch.testing.assert_close(*steps, rtol=1e-8, atol=1e-10)


def test_a_conditioner_that_several_layers_share_is_seen_as_one():
    outputs = SplineCoupling(4, MLP, bins=4).count_parameters(2)
    net = MLP(2, outputs, hidden_features=5)
    flow = randomized(coupling_flow("store", lambda i, o: net))
    x = torch.randn(6, 4, dtype=torch.float64)
    exact = {}
    for row in x:
        flow.zero_grad()
        (-flow.log_prob(row[None]).sum()).backward()
        for layer in matrix_layers(flow):
            matrix = layer.gradient()
            exact[layer.name] = exact.get(layer.name, 0) + matrix @ matrix.mT / len(x)
    flow.zero_grad()
    optimizer = NGPlus(flow)
    (-flow.log_prob(x).mean()).backward()
    optimizer.step()
    assert optimizer.curvature().keys() == exact.keys()
    for name, moment in optimizer.curvature().items():
        torch.testing.assert_close(moment, exact[name], rtol=1e-9, atol=1e-12)


def test_masked_entries_stay_where_they_are():
    model = randomized(MADE(3, 2, hidden_features=6))
    hidden = [~layer.module.mask for layer in matrix_layers(model)]
    for make in OPTIMIZERS.values():
        before = [layer.weight.detach().clone() for layer in matrix_layers(model)]
        optimizer = make(model, lr=0.1)
        optimizer.zero_grad()
        model(torch.randn(5, 3).double()).square().mean().backward()
        optimizer.step()
        for layer, old, masked in zip(matrix_layers(model), before, hidden, strict=True):
            moved = layer.weight != old
            assert moved.any() and not moved[masked].any()


# --- ProxProp ----------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("normalize", [False, True])
def test_proxprop_is_its_closed_form(make_model, make_inputs, normalize):
    model, x = randomized(make_model()), make_inputs()
    inputs = {}

    def keep(layer):
        def hook(module, arguments):
            inputs.setdefault(layer.name, []).append(arguments[0].detach())

        return layer.module.register_forward_pre_hook(hook)

    layers = matrix_layers(model)
    handles = [keep(layer) for layer in layers]
    optimizer = ProxProp(
        model, lr=0.1, tau_theta=0.3, momentum=0.0, nesterov=False, normalize=normalize
    )
    sum_of_squares(model, x).mean().backward()
    for handle in handles:
        handle.remove()
    before = {layer: layer.matrix(layer.weight, layer.bias).detach().clone() for layer in layers}
    optimizer.step()
    for layer in layers:
        columns = [column for a in inputs[layer.name] for column in seen_by(layer, a)]
        a = torch.cat(columns, dim=1)
        gram = a @ a.mT / (len(x) if normalize else 1)
        direction = layer.gradient() @ torch.linalg.inv(gram + torch.eye(len(a)).double() / 0.3)
        if layer.mask is not None:
            direction = direction * layer.mask
        after = layer.matrix(layer.weight, layer.bias).detach()
        error = (after - before[layer] + 0.1 * direction).abs().max()
        assert error <= 1e-10 * max(1.0, direction.abs().max())


def seen_by(layer, inputs):
    """Columns that a layer multiplies, from the definition of a convolution by its Jacobian."""
    module = layer.module
    for sample in inputs:

        def outputs(weight, sample=sample):
            fixed = functional_call(module, {"weight": weight}, (sample[None],))
            bias = (
                0.0
                if module.bias is None
                else functional_call(module, {"weight": torch.zeros_like(weight)}, (sample[None],))
            )
            fixed = fixed - bias
            return fixed[..., 0] if isinstance(module, nn.Linear) else fixed[:, 0]

        plain = module.weight.detach()
        if layer.mask is not None:
            columns = sample.reshape(1, -1)
        else:
            jacobian = torch.func.jacrev(outputs)(plain)
            columns = jacobian.flatten(0, -1 - plain.ndim)[:, 0].flatten(1)
        if layer.bias is not None:
            columns = torch.cat([columns, torch.ones(len(columns), 1).double()], dim=1)
        yield columns.mT


def test_conjugate_gradients_tend_to_the_exact_solution():
    x = torch.randn(20, 6).double()
    errors = []
    for iterations in (1, 3, 12):
        steps = []
        for solver in ("exact", "cg"):
            torch.manual_seed(1)
            model = randomized(nn.Sequential(nn.Linear(6, 4)))
            start = model[0].weight.detach().clone()
            optimizer = ProxProp(model, solver=solver, iterations=iterations)
            sum_of_squares(model, x).mean().backward()
            gradient = model[0].weight.grad
            optimizer.step()
            steps.append(model[0].weight.detach() - start)
            assert (steps[-1] * gradient).sum() < 0  # downhill
        errors.append((steps[1] - steps[0]).norm() / steps[0].norm())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-9


def test_proxprop_hands_its_direction_to_adam():
    model = randomized(nn.Sequential(nn.Linear(3, 2)))
    optimizer = ProxProp(model, lr=0.1, follow="adam")
    before = model[0].weight.detach().clone()
    sum_of_squares(model, torch.randn(5, 3).double()).mean().backward()
    optimizer.step()
    # The first step of Adam has the length of the learning rate.
    moved = (model[0].weight.detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=1e-4, atol=0)


# --- SENG --------------------------------------------------------------------------------------


@each_model
def test_seng_is_the_dense_solution(make_model, make_inputs):
    model, x = randomized(make_model()), make_inputs()
    matrices = per_sample_matrices(model, sum_of_squares, x)
    layers = matrix_layers(model)
    before = {layer: layer.matrix(layer.weight, layer.bias).detach().clone() for layer in layers}
    optimizer = SENG(model, lr=0.1, momentum=0.0, damping=0.3)
    sum_of_squares(model, x).mean().backward()
    optimizer.step()
    for layer in layers:
        rows = matrices[layer.name].flatten(1)
        dense = rows.mT @ rows / len(x) + 0.3 * torch.eye(rows.shape[1]).double()
        direction = torch.linalg.solve(dense, rows.mean(0)).view(layer.rows, -1)
        moved = layer.matrix(layer.weight, layer.bias).detach() - before[layer]
        assert (moved + 0.1 * direction).abs().max() <= 1e-10 * max(1, direction.abs().max())


@each_model
def test_seng_may_take_the_first_samples_only(make_model, make_inputs):
    model, x = randomized(make_model()), make_inputs()
    matrices = per_sample_matrices(model, sum_of_squares, x)
    layers = matrix_layers(model)
    before = {layer: layer.matrix(layer.weight, layer.bias).detach().clone() for layer in layers}
    optimizer = SENG(model, lr=0.1, momentum=0.0, damping=0.3, max_samples=3)
    sum_of_squares(model, x).mean().backward()
    optimizer.step()
    for layer in layers:
        rows = matrices[layer.name].flatten(1)
        dense = rows[:3].mT @ rows[:3] / 3 + 0.3 * torch.eye(rows.shape[1]).double()
        direction = torch.linalg.solve(dense, rows.mean(0)).view(layer.rows, -1)
        moved = layer.matrix(layer.weight, layer.bias).detach() - before[layer]
        assert (moved + 0.1 * direction).abs().max() <= 1e-10 * max(1, direction.abs().max())


def test_a_sketch_is_unbiased_and_of_all_columns_exact():
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()))
    x = images(4)
    rows = per_sample_matrices(model, sum_of_squares, x)["0"].flatten(1) / 2
    exact = rows @ rows.mT
    grams, products = [], []
    from flows.optim.seng import _Rows

    gradient = model[0].weight.new_ones(3, 19)
    for _ in range(4000):
        columns = torch.randperm(rows.shape[1])[:20]
        sketch = _Rows({"rows": rows, "columns": columns}, gradient.shape)
        grams.append(sketch.gram())
        products.append(sketch.times(gradient))
    for found, wanted in [(grams, exact), (products, rows.sum(1))]:
        found = torch.stack(found)
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - wanted).abs() <= 4 * error).all()
    steps = []
    for sketch in (None, 1000, 20):
        torch.manual_seed(0)
        model = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()))
        optimizer = SENG(model, sketch=sketch)
        sum_of_squares(model, x).mean().backward()
        optimizer.step()
        steps.append(model[0].weight.detach().clone())
    assert torch.equal(steps[0], steps[1]) and not torch.equal(steps[0], steps[2])


# --- what all have in common -------------------------------------------------------------------


@each_optimizer
def test_what_is_no_matrix_is_trained_as_by_adamw(make):
    x = torch.randn(32, 2)
    flows = []
    for own in (False, True):
        torch.manual_seed(0)
        flow = RotationSplineFlow(features=2, layers=2, hidden_features=8)
        matrices, others = param_groups_for(flow)
        with torch.no_grad():
            flow(x)
        if own:
            optimizer = make(flow, lr=1e-30, adamw_lr=0.02, adamw_weight_decay=0.1)
        else:
            optimizer = torch.optim.AdamW(others["params"], lr=0.02, weight_decay=0.1, fused=True)
        for _ in range(3):
            flow.zero_grad()
            (-flow.log_prob(x).mean()).backward()
            optimizer.step()
        flows.append(torch.nn.utils.parameters_to_vector(others["params"]).detach())
    assert torch.equal(*flows)


@each_optimizer
def test_a_closure_and_a_scheduler_work_as_in_any_optimizer(make):
    model = randomized(MLP(2, 2, hidden_features=4))
    optimizer = make(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    x = torch.randn(4, 2).double()

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    scheduler.step()
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    assert loss > 0 and torch.equal(before, after)  # the rate is zero from the start


SAVED = {
    "NG+": lambda flow, lr: NGPlus(flow, lr=lr, refresh_every=10),
    "NG+, mean gradient": lambda flow, lr: NGPlus(
        flow, lr=lr, refresh_every=10, statistic="mean_grad"
    ),
    "ProxProp": lambda flow, lr: ProxProp(flow, lr=lr),
    "ProxProp, Adam": lambda flow, lr: ProxProp(flow, lr=lr, follow="adam"),
    "SENG": lambda flow, lr: SENG(flow, lr=lr, refresh_every=10),
    "SENG, sketched": lambda flow, lr: SENG(flow, lr=lr, refresh_every=10, sketch=8),
}


@pytest.mark.parametrize("make", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("recipe", [RotationSplineFlow, MaskedSplineFlow])
def test_a_saved_state_goes_on_bit_for_bit(make, recipe):
    def batch(step):
        return torch.randn(16, 2, generator=torch.Generator().manual_seed(step))

    def advance(flow, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            (-flow.log_prob(batch(step)).mean()).backward()
            optimizer.step()

    def make_flow():
        torch.manual_seed(0)
        return recipe(features=2, layers=2, hidden_features=8)

    whole = make_flow()
    optimizer = make(whole, 0.01)
    advance(whole, optimizer, range(6))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    advance(whole, optimizer, range(6, 14))
    resumed = make_flow()
    resumed.load_state_dict(saved[0])
    again = make(resumed, 0.5)
    again.load_state_dict(saved[1])
    advance(resumed, again, range(6, 14))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_hooks_are_there_for_refreshes_only():
    model = randomized(MLP(2, 2, hidden_features=4))
    optimizer = NGPlus(model, refresh_every=8)
    hooked = []
    for _ in range(18):
        hooked.append(any(part._forward_hooks for part in model.modules()))
        optimizer.zero_grad()
        model(torch.randn(4, 2).double()).square().mean().backward()
        optimizer.step()
    assert [step for step, there in enumerate(hooked) if there] == [0, 1, 2, 3, 4, 6, 8, 16]


def test_the_mean_gradient_needs_no_hooks():
    model = randomized(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    optimizer = NGPlus(model, statistic="mean_grad")
    assert not model[0]._forward_hooks
    sum_of_squares(model, torch.randn(5, 3).double()).mean().backward()
    optimizer.step()
    gradient = torch.cat([model[0].weight.grad, model[0].bias.grad.unsqueeze(1)], dim=1)
    torch.testing.assert_close(optimizer.curvature()["0"], gradient @ gradient.mT)


def test_memory_of_a_refresh_does_not_grow_as_batch_times_weight(monkeypatch):
    monkeypatch.setattr("flows.optim.statistics.BUDGET", 1000)
    sizes = []
    plain = torch.Tensor.__matmul__

    def watched(a, b):
        result = plain(a, b)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    layer = nn.Linear(40, 30)
    model = nn.Sequential(layer, nn.Flatten())
    optimizer = NGPlus(model)
    model(torch.randn(500, 9, 40)).square().mean().backward()
    optimizer.step()
    assert max(sizes) < 2 * 30 * 41 + 500


@each_optimizer
def test_half_precision_and_a_scaled_loss_change_nothing_but_rounding(make):
    x = torch.randn(64, 3)
    states = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = MLP(3, 2, hidden_features=8)
        nn.init.normal_(model.last.weight)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14) if scaled else None
        optimizer = make(model, lr=0.1, scaler=scaler)
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            loss = model(x).float().square().sum(1).mean()
        if scaled:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
        states.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    difference = (states[1] - states[0]).norm() / states[0].norm()
    assert 0 < difference < 2e-3


def test_what_it_knows_keeps_its_precision_in_a_state():
    model = randomized(MLP(2, 2, hidden_features=4)).bfloat16()
    optimizer = NGPlus(model)
    model(torch.randn(8, 2).bfloat16()).square().mean().backward()
    optimizer.step()
    again = NGPlus(model)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, moment in optimizer.curvature().items():
        assert moment.dtype == torch.float32 and torch.equal(again.curvature()[name], moment)


def test_proxprop_divides_each_layer_by_its_own_samples():
    class Several(nn.Module):
        """Five rows for each one of the first layer."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)).repeat_interleave(5, 0))

    model, x = randomized(Several()), torch.randn(8, 2).double()
    before = [p.detach().clone() for p in model.parameters()]
    seen = [x, torch.tanh(x @ before[0].mT).repeat_interleave(5, 0)]
    optimizer = ProxProp(model, lr=0.1, tau_theta=0.5, momentum=0, nesterov=False, normalize=True)
    model(x).square().mean().backward()
    optimizer.step()
    for parameter, old, a in zip(model.parameters(), before, seen, strict=True):
        damped = a.mT @ a / len(a) + 2 * torch.eye(a.shape[1]).double()
        step = parameter.grad @ torch.linalg.inv(damped)
        torch.testing.assert_close(parameter.detach(), old - 0.1 * step)


@each_optimizer
@pytest.mark.parametrize("rows", [6, 9])
def test_gradients_of_inputs_alone_leave_no_trace(make, rows):
    x, others = torch.randn(6, 3).double(), torch.randn(rows, 3).double()
    ends = []
    for asked in (False, True):
        torch.manual_seed(0)
        model = randomized(MLP(3, 2, hidden_features=4))
        optimizer = make(model, lr=0.1)
        if asked:
            others.requires_grad_()
            torch.autograd.grad(model(others).sum(), others)
        model(x).square().mean().backward()
        optimizer.step()
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*ends)


@each_optimizer
@pytest.mark.parametrize("frozen", ["first", "first.weight", "first.bias"])
def test_layers_may_be_frozen_and_set_free(make, frozen):
    model = randomized(MLP(3, 2, hidden_features=4, blocks=1))
    optimizer = make(model, lr=0.01)
    part = [p for name, p in model.named_parameters() if name.startswith(frozen)]
    for step in range(9):
        for parameter in part:
            parameter.requires_grad_(not 2 <= step < 6)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(torch.randn(5, 3).double()).square().mean().backward()
        optimizer.step()
        for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
            if not parameter.requires_grad:
                assert torch.equal(parameter, old), name
            elif not (frozen == "first.weight" and name == "first.bias" and 2 <= step < 6):
                assert not torch.equal(parameter, old), name


def test_calls_for_several_batches_are_summed_or_refused():
    x, few = torch.randn(8, 3).double(), torch.randn(4, 3).double()
    for make in (NGPlus, SENG):
        model = randomized(MLP(3, 2, hidden_features=4))
        optimizer = make(model)
        with pytest.raises(ValueError, match="batches of 4, 8 samples in one .* or exclude "):
            (model(x).square().mean() + model(few).square().mean()).backward()
            optimizer.step()
    model = randomized(nn.Sequential(nn.Linear(3, 2, bias=False)))
    old = model[0].weight.detach().clone()
    optimizer = ProxProp(model, lr=0.1, tau_theta=0.5, momentum=0, nesterov=False)
    (model(x).square().mean() + model(few).square().mean()).backward()
    optimizer.step()
    gram = x.mT @ x + few.mT @ few + 2 * torch.eye(3).double()
    step = model[0].weight.grad @ torch.linalg.inv(gram)
    torch.testing.assert_close(model[0].weight.detach(), old - 0.1 * step)


def test_proxprop_goes_on_where_inputs_are_not_finite():
    model = randomized(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh()))
    optimizer = ProxProp(model, lr=0.1, tau_theta=0.5, momentum=0, nesterov=False)
    old = model[0].weight.detach().clone()
    x = torch.tensor([[1e200, 0.5], [0.1, 0.2]], dtype=torch.float64)
    model(x).mean().backward()
    with pytest.warns(UserWarning, match="inputs of 0 that are not finite, at step 0"):
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), old - 0.1 * 0.5 * model[0].weight.grad)


def test_each_kind_of_trouble_is_said_once():
    model = randomized(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    optimizer = NGPlus(model, refresh_every=1)
    x = torch.randn(4, 2).double()
    for inputs, message in ((x, "saw no call"), (x * 1e200, "not finite")):
        optimizer.zero_grad()
        model.train(inputs is not x)
        model(inputs).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        with pytest.warns(UserWarning, match=message):
            optimizer.step()


def test_an_optimizer_is_not_copied_and_takes_its_hooks_along():
    model = randomized(MLP(2, 2, hidden_features=4))
    optimizer = ProxProp(model)
    with pytest.raises(TypeError, match="ProxProp belongs to its model and cannot be copied"):
        copy.deepcopy(optimizer)
    assert any(part._forward_hooks for part in model.modules())
    optimizer.close()
    assert not any(part._forward_hooks for part in model.modules())


def test_one_cycle_moves_rate_and_momentum():
    model = randomized(MLP(2, 2, hidden_features=4))
    optimizer = NGPlus(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=10)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 2).double()).square().mean().backward()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] != 0.9


@pytest.mark.parametrize("make", [NGPlus, SENG])
def test_statistics_that_are_not_finite_are_left_out_and_said_once(make):
    model = randomized(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    optimizer = make(model, refresh_every=1)

    def step(x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        for parameter in model.parameters():
            parameter.grad.nan_to_num_(0.0)
        optimizer.step()

    x = torch.randn(4, 2).double()
    step(x)
    known = copy.deepcopy(optimizer.state_dict()["state"][0])
    with pytest.warns(UserWarning, match="not finite, at step 1: it keeps what it knew"):
        step(x.clone().fill_(1e200))
    kept = optimizer.state_dict()["state"][0]
    name = "curvature" if make is NGPlus else "inputs"
    assert torch.equal(kept[name], known[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(x.clone().fill_(1e200))
        step(x)


@each_optimizer
def test_a_layer_whose_call_is_not_seen_is_named(make):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = nn.Linear(2, 2)
            self.unseen = nn.Linear(2, 2)

        def forward(self, x):
            return functional.linear(self.seen(x), self.unseen.weight, self.unseen.bias)

    model = randomized(Around())
    optimizer = make(model)
    x = torch.randn(4, 2).double()
    if make is NGPlus:
        model(x).square().sum(1).mean().backward()
        with pytest.warns(UserWarning, match="saw no call in training mode of unseen"):
            optimizer.step()
        gradient = torch.cat([model.unseen.weight.grad, model.unseen.bias.grad[:, None]], 1)
        torch.testing.assert_close(optimizer.curvature()["unseen"], gradient @ gradient.mT)
    else:
        with pytest.raises(ValueError, match="exclude 'unseen'"):
            model(x).square().sum(1).mean().backward()


@pytest.mark.parametrize("make", [ProxProp, SENG])
def test_a_loss_that_sees_the_weight_itself_is_refused(make):
    model = randomized(nn.Sequential(nn.Linear(3, 3)))
    make(model)
    loss = model(torch.randn(4, 3).double()).square().mean()
    with pytest.raises(ValueError, match="through the layer's outputs only.*exclude '0'"):
        (loss - model[0].weight.slogdet().logabsdet).backward()


def test_an_empty_batch_changes_no_statistics():
    model = randomized(MLP(2, 2, hidden_features=4))
    optimizer = NGPlus(model, refresh_every=1)
    for batch in (4, 0):
        optimizer.zero_grad()
        model(torch.randn(batch, 2).double()).square().sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if batch == 0 else "error")
            optimizer.step()
    assert all(moment.isfinite().all() for moment in optimizer.curvature().values())


def test_which_parameters_are_matrices():
    flow = RotationSplineFlow(features=4, layers=2)
    matrices, others = param_groups_for(flow)
    names = {id(p): name for name, p in flow.named_parameters()}
    assert len(matrices["params"]) + len(others["params"]) == len(names)
    assert all("conditioner" in names[id(p)] or "net" in names[id(p)] for p in matrices["params"])
    assert any("angles" in names[id(p)] for p in others["params"])
    smaller, _ = param_groups_for(flow, exclude=["*.last"])
    assert len(smaller["params"]) == len(matrices["params"]) - 2 * 2
    layers = matrix_layers(flow, max_dim=64)
    assert all(layer.rows <= 64 for layer in layers) and len(layers) < len(matrix_layers(flow))


def test_layers_it_does_not_know_are_left_to_adamw():
    class Own(nn.Linear):
        def forward(self, x):
            return x @ self.weight.mT

    tied = nn.Linear(3, 3)
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(3, 3),
            "own": Own(3, 3),
            "grouped": nn.Conv2d(4, 4, 1, groups=2),
            "circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            "frozen": nn.Linear(3, 3).requires_grad_(False),
            "norm": nn.LayerNorm(3),
            "tied": tied,
            "other": nn.Linear(3, 3),
            "orthogonal": nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
        }
    )
    model["other"].weight = tied.weight
    assert [layer.name for layer in matrix_layers(model)] == ["plain"]


BAD = {
    "parameters": (lambda: NGPlus(list(nn.Linear(2, 2).parameters())), "needs the model"),
    "no matrix": (lambda: NGPlus(nn.LayerNorm(3)), "linear or convolution layers"),
    "too many outputs": (lambda: NGPlus(nn.Linear(2, 9), max_dim=8), "at most 8 outputs"),
    "batch norm": (
        lambda: NGPlus(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
        r"batch norm mixes: got 1 \(BatchNorm1d\)",
    ),
    "batch norm, SENG": (
        lambda: SENG(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
        "batch norm",
    ),
    "randomized": (
        lambda: NGPlus(randomize(MLP(2, 2), keep=0.5)),
        r"inputs of layers, .* randomized ones drop them: got first \(RandomizedLinear\)",
    ),
    "lr": (lambda: NGPlus(nn.Linear(2, 2), lr=0.0), "lr"),
    "adamw_lr": (lambda: SENG(nn.Linear(2, 2), adamw_lr=-1.0), "adamw_lr"),
    "damping": (lambda: NGPlus(nn.Linear(2, 2), damping=0.0), "damping"),
    "damping, SENG": (lambda: SENG(nn.Linear(2, 2), damping=-1.0), "damping"),
    "damping without bound": (lambda: NGPlus(nn.Linear(2, 2), damping=float("inf")), "damping"),
    "max_samples": (lambda: SENG(nn.Linear(2, 2), max_samples=0), "max_samples"),
    "sketch": (lambda: SENG(nn.Linear(2, 2), sketch=0), "sketch"),
    "decay": (lambda: NGPlus(nn.Linear(2, 2), curvature_decay=1.0), "curvature_decay"),
    "refresh": (lambda: NGPlus(nn.Linear(2, 2), refresh_every=0), "refresh_every"),
    "statistic": (lambda: NGPlus(nn.Linear(2, 2), statistic="mean"), "'mean_grad', got 'mean'"),
    "momentum": (lambda: NGPlus(nn.Linear(2, 2), momentum=1.0), "momentum"),
    "nesterov": (lambda: NGPlus(nn.Linear(2, 2), momentum=0.0, nesterov=True), "nesterov"),
    "weight decay": (lambda: NGPlus(nn.Linear(2, 2), weight_decay=-1.0), "weight_decay"),
    "tau_theta": (lambda: ProxProp(nn.Linear(2, 2), tau_theta=0.0), "tau_theta"),
    "solver": (lambda: ProxProp(nn.Linear(2, 2), solver="lu"), "'cg', got 'lu'"),
    "iterations": (lambda: ProxProp(nn.Linear(2, 2), iterations=0), "iterations"),
    "follow": (lambda: ProxProp(nn.Linear(2, 2), follow="muon"), "'adam', got 'muon'"),
    "adamw decay": (
        lambda: NGPlus(nn.Linear(2, 2), adamw_weight_decay=-1.0),
        "adamw_weight_decay",
    ),
    "exclude, a word": (lambda: NGPlus(nn.Linear(2, 2), exclude="last"), "list of names"),
    "exclude": (lambda: NGPlus(nn.Linear(2, 2), exclude=["*.last"]), "got '\\*.last'"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_group_can_be_added_later():
    optimizer = NGPlus(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="takes no more groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


@each_optimizer
@pytest.mark.parametrize(
    "make_flow, make_inputs",
    [
        (lambda: RotationSplineFlow(2, layers=2, hidden_features=16), lambda: torch.randn(128, 2)),
        (lambda: MaskedSplineFlow(3, layers=1, hidden_features=16), lambda: torch.randn(128, 3)),
        (
            lambda: Glow((1, 4, 4), grey_levels=4, levels=1, steps=1, hidden_features=8),
            lambda: torch.randint(4, (64, 1, 4, 4)) / 4,
        ),
    ],
    ids=["rotations", "masked", "Glow"],
)
def test_flows_learn_with_their_defaults(make, make_flow, make_inputs):
    torch.manual_seed(0)
    flow, inputs = make_flow(), make_inputs()
    if inputs.ndim == 2:
        inputs = inputs * 0.1 + inputs.square() * 2
    with torch.no_grad():
        flow(inputs)
    optimizer = make(flow)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = -flow.log_prob(inputs).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) / 5 < losses[0] - 0.05
