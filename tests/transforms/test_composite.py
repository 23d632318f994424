"""What a chain keeps for its backward pass; the contract compares the gradients of all layers."""

import copy
import os
from functools import partial

import pytest
import torch
from nflows.transforms import AffineCouplingTransform, BatchNorm, IdentityTransform
from torch import Tensor, multiprocessing, nn
from torch.func import functional_call, jacrev
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from flows.nets import MLP
from flows.transforms import (
    ActNorm,
    AffineCoupling,
    Composite,
    Dequantize,
    InverseNotAvailable,
    Permutation,
    Rotation,
    SplineCoupling,
    Transform,
)

MODES = ["checkpoint", "reversible"]
each_mode = pytest.mark.parametrize("memory", MODES)
each_kept = pytest.mark.parametrize(
    ("memory", "keep_every"),
    [("checkpoint", None), ("checkpoint", 3), ("reversible", None), ("reversible", 2)],
)


def chain(memory="store", keep_every=None, *, steps=3, dropout=0.0, dtype=torch.float64):
    """Steps as in recipes for vectors, with random parameters; the same ones every time."""
    torch.manual_seed(0)
    net = partial(MLP, hidden_features=8, blocks=1, dropout=dropout)
    transforms = []
    for step in range(steps):
        transforms += [
            Rotation(4, init="haar"),
            SplineCoupling(4, net, flip=step % 2 == 1),
            AffineCoupling(4, net),
        ]
    composite = Composite(transforms, memory=memory, keep_every=keep_every).to(dtype)
    for parameter in composite.parameters():
        nn.init.normal_(parameter, std=0.2)
    return composite


def data(rows=20, dtype=torch.float64) -> Tensor:
    return torch.randn(rows, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


def loss(composite: Transform, inputs: Tensor) -> Tensor:
    outputs, logabsdet = composite(inputs)
    return (outputs.square().sum(1) / 2 - logabsdet).mean()


def gradients(composite: Transform, inputs: Tensor, seed: int = 2) -> list[Tensor]:
    composite.zero_grad()
    torch.manual_seed(seed)
    loss(composite, inputs).backward()
    return [parameter.grad for parameter in composite.parameters()]


def kept_bytes(composite: Composite) -> int:
    """Bytes that autograd keeps for the backward pass of a loss, parameters aside."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nll = loss(composite, data())
    assert nll.isfinite()
    return sum(storages.values())


# --- the same gradients ------------------------------------------------------------------------


@each_kept
def test_gradients_of_long_chains_are_those_of_stored_ones(memory, keep_every):
    expected = gradients(chain(steps=8), data())
    found = gradients(chain(memory, keep_every, steps=8), data())
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


@each_kept
def test_noise_of_dropout_is_repeated(memory, keep_every):
    def noisy(*options) -> Composite:
        composite = chain(*options, dropout=0.5)
        net = partial(MLP, hidden_features=8, blocks=1, dropout=0.5)
        # Has no recover of its own: it goes back, then forth, with the same noise.
        theirs = AffineCouplingTransform([1, -1, 1, -1], net).double()
        nn.init.normal_(theirs.transform_net.last.weight, std=0.2)
        composite.transforms.append(theirs)
        return composite

    expected = gradients(noisy(), data())
    assert not torch.equal(gradients(noisy(), data(), seed=3)[0], expected[0])
    found = gradients(noisy(memory, keep_every), data())
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


@each_mode
def test_the_backward_pass_leaves_the_generator_as_it_was(memory):
    composite = chain(memory, dropout=0.5)
    nll = loss(composite, data())
    before = torch.get_rng_state()
    nll.backward()
    assert torch.equal(torch.get_rng_state(), before)


@each_mode
def test_noise_between_grey_levels_is_repeated(memory):
    levels = torch.randint(0, 8, (20, 4)).double() / 8
    found = []
    for kept in ("store", memory):
        composite = Composite([Dequantize(8), *chain().transforms], memory=kept)
        found.append(gradients(composite, levels))
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=1e-7)


@each_mode
def test_first_batch_initializes_once(memory):
    results = []
    for kept in ("store", memory):
        torch.manual_seed(0)
        composite = Composite([ActNorm(4), Rotation(4), ActNorm(4)], memory=kept).double()
        results.append(gradients(composite, 3 * data() + 1))
        results[-1] += [tensor.clone() for tensor in composite.state_dict().values()]
    torch.testing.assert_close(results[1], results[0])


class Normalized(nn.Module):
    """A conditioner that counts: batch normalization updates its statistics when called."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features, 8), nn.BatchNorm1d(8), nn.Linear(8, out_features)
        )

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layers(inputs)


@each_kept
def test_statistics_are_updated_once(memory, keep_every):
    results = []
    for options in ({}, {"memory": memory, "keep_every": keep_every}):
        torch.manual_seed(0)
        mask = [1, -1, 1, -1]
        layers = [
            AffineCoupling(4, Normalized),
            Rotation(4, init="haar"),
            AffineCouplingTransform(mask, Normalized),  # goes back by its inverse
        ]
        composite = Composite(layers, **options).double()
        found = gradients(composite, data())
        found += [buffer.clone() for buffer in composite.buffers()]
        results.append(found)
    torch.testing.assert_close(results[1], results[0], atol=1e-9, rtol=1e-7)


def test_layer_that_has_no_inverse_while_it_trains_says_so():
    composite = Composite([BatchNorm(4)], memory="reversible").double()
    with pytest.raises(InverseNotAvailable):
        gradients(composite, data())
    gradients(Composite([BatchNorm(4)], memory="checkpoint").double(), data())


@each_mode
def test_shared_and_frozen_parameters(memory):
    found = []
    for kept in ("store", memory):
        composite = chain(kept)
        shared = composite.transforms[1]
        composite.transforms.append(shared)
        composite.transforms[2].requires_grad_(False)
        results = gradients(composite, data())
        assert sum(gradient is None for gradient in results) == 6
        found.append([gradient for gradient in results if gradient is not None])
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=1e-7)


@each_mode
def test_hooks_of_parameters_run_once(memory):
    composite = chain(memory)
    expected = gradients(composite, data())
    calls = []

    def double(gradient: Tensor) -> Tensor:
        calls.append(gradient)
        return 2 * gradient

    parameters = list(composite.parameters())
    for parameter in parameters:
        parameter.register_hook(double)
    found = gradients(composite, data())
    assert len(calls) == len(parameters)
    torch.testing.assert_close(found, [2 * gradient for gradient in expected])


@each_mode
def test_gradients_reach_lent_parameters(memory):
    # The backward pass comes when the module has its own parameters again.
    composite, other = chain(memory), chain()
    lent = {name: 0.9 * p.detach() for name, p in other.named_parameters()}
    for tensor in lent.values():
        tensor.requires_grad_()
    outputs, logabsdet = functional_call(composite, lent, (data(),))
    (outputs.square().sum(1) / 2 - logabsdet).mean().backward()
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    torch.testing.assert_close(
        [tensor.grad for tensor in lent.values()], gradients(other, data()), atol=1e-9, rtol=1e-7
    )
    assert all(parameter.grad is None for parameter in composite.parameters())


@each_mode
def test_backward_twice_adds_up(memory):
    composite = chain(memory)
    expected = gradients(composite, data())
    nll = loss(composite, data())
    composite.zero_grad()
    nll.backward(retain_graph=True)
    nll.backward()
    found = [parameter.grad for parameter in composite.parameters()]
    torch.testing.assert_close(found, [2 * gradient for gradient in expected])


def test_parameters_changed_before_the_backward_pass_are_noticed():
    composite = chain("reversible")
    nll = loss(composite, data())
    with torch.no_grad():
        composite.transforms[0].raw_angles.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll.backward()


@each_mode
def test_modes_are_as_they_were(memory):
    found = []
    for kept in ("store", memory):
        composite = chain(kept, dropout=0.5)
        torch.manual_seed(2)
        nll = loss(composite, data())
        composite.eval()
        nll.backward()
        assert not any(part.training for part in composite.modules())
        found.append([parameter.grad for parameter in composite.parameters()])
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=1e-7)


@each_mode
def test_buffers_changed_before_the_backward_pass_are_noticed(memory):
    composite = Composite([AffineCoupling(4, Normalized)], memory=memory).double().eval()
    nll = loss(composite, data())
    composite.train()
    with torch.no_grad():
        composite(data())
    with pytest.raises(RuntimeError, match="buffers of .* were changed between its forward and"):
        nll.backward()


class Counting(MLP):
    """Counts its calls in a buffer that it assigns."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, hidden_features=8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(inputs, context)


@each_mode
def test_assigned_buffers_are_updated_once(memory):
    composite = Composite([AffineCoupling(4, Counting), Rotation(4)], memory=memory).double()
    gradients(composite, data())
    assert composite.transforms[0].net.calls == 1


class Doubled(AffineCoupling):
    """A coupling with a forward and an inverse of its own."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, logabsdet = super().forward(inputs, context)
        return 2 * outputs, logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(inputs / 2, context)


@each_mode
def test_layers_derived_from_couplings_go_their_own_way(memory):
    found = []
    for kept in ("store", memory):
        composite = chain(kept)
        for transform in composite.transforms:
            if type(transform) is AffineCoupling:
                transform.__class__ = Doubled
        found.append(gradients(composite, data()))
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=1e-7)


@each_mode
def test_two_passes_before_the_backward_pass(memory):
    found = []
    for kept in ("store", memory):
        composite = chain(kept, dropout=0.5)
        torch.manual_seed(2)
        there, logabsdet = composite(data())
        back, _ = composite.inverse(there.detach() + 0.1)
        (there.square().sum() + back.square().sum() - logabsdet.sum()).backward()
        found.append([parameter.grad for parameter in composite.parameters()])
    torch.testing.assert_close(found[1], found[0], atol=1e-8, rtol=1e-7)


def test_sampling_through_dequantization_draws_nothing_on_its_way_back():
    composite = Composite([Dequantize(8), Rotation(4, init="haar")], memory="reversible")
    outputs, _ = composite.inverse(data(dtype=torch.float32).requires_grad_())
    before = torch.get_rng_state()
    outputs.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@each_mode
def test_weights_held_by_a_cache_are_refused(memory):
    composite = chain(memory)
    with parametrize.cached():
        with pytest.raises(RuntimeError, match=f"memory='{memory}' cannot .*parametrize.cached"):
            composite(data())
        with torch.no_grad():
            composite(data())


class Whole(Transform):
    """Takes whole numbers to real ones."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs.double() / 3, inputs.new_zeros(len(inputs), dtype=torch.float64)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (inputs * 3).round().long(), inputs.new_zeros(len(inputs))


@each_mode
def test_whole_numbers_on_the_way(memory):
    inputs, found = torch.arange(80).view(20, 4), []
    for kept in ("store", memory):
        torch.manual_seed(0)
        layers = [Permutation(4), Whole(), *chain().transforms]
        found.append(gradients(Composite(layers, memory=kept).double(), inputs))
    torch.testing.assert_close(found[1], found[0], atol=1e-8, rtol=1e-7)


@each_mode
def test_autocast_is_as_it_was(memory):
    inputs, found = data(dtype=torch.float32), []
    for kept in ("store", memory, "store"):
        composite = chain(kept, steps=1, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=len(found) < 2):
            nll = loss(composite, inputs)
            # The cache of autocast must not serve what follows with casts without a gradient.
            again = loss(Composite(composite.transforms), inputs)
        (nll + again).backward()
        found.append(torch.cat([p.grad.flatten() for p in composite.parameters()]))
    stored, ours, exact = found
    rounding = (stored - exact).norm()
    assert rounding > 1e-4 * exact.norm()
    assert (ours - stored).norm() <= 0.2 * rounding


# --- what is kept ------------------------------------------------------------------------------


def test_reversible_chains_keep_the_same_at_every_depth():
    kept = {
        (memory, steps): kept_bytes(chain(memory, steps=steps))
        for memory in ("store", *MODES)
        for steps in (2, 8)
    }
    row = data()[0].nbytes
    assert kept["reversible", 8] == kept["reversible", 2] <= 20 * (2 * row + 40)
    assert kept["checkpoint", 8] - kept["checkpoint", 2] == 18 * 20 * row
    assert kept["store", 8] - kept["store", 2] > 8 * 18 * 20 * row


def test_keep_every_keeps_so_many_inputs():
    row = data()[0].nbytes
    kept = [kept_bytes(chain("reversible", every, steps=4)) for every in (None, 6, 3)]
    assert [bytes - kept[0] for bytes in kept] == [0, 20 * row, 3 * 20 * row]
    kept = [kept_bytes(chain("checkpoint", every, steps=4)) for every in (None, 6)]
    assert kept[0] - kept[1] == 10 * 20 * row


def test_inversion_error_is_that_of_the_recovered_inputs():
    composite, inputs = chain("reversible", dtype=torch.float32, steps=8), data()
    assert composite.inversion_error is None
    gradients(composite, inputs.float())
    outputs, _ = composite(inputs.float())
    back, _ = composite.inverse(outputs)
    expected = (back - inputs.float()).abs().max() / inputs.abs().max()
    assert 1e-8 < expected < 1e-2
    assert expected / 3 < composite.inversion_error < 3 * expected
    finer = chain("reversible", 1, dtype=torch.float32, steps=8)
    gradients(finer, inputs.float())
    assert 0 < finer.inversion_error < composite.inversion_error


class Wrong(Rotation):
    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, logabsdet = super().inverse(inputs, context)
        return outputs + 0.25, logabsdet


def test_inversion_error_tells_of_a_wrong_inverse():
    composite = Composite([Wrong(4)], memory="reversible")
    gradients(composite, data(dtype=torch.float32) / 10)
    assert composite.inversion_error == pytest.approx(0.25, abs=1e-6)
    layers = [Rotation(4), Rotation(4), Wrong(4), Rotation(4)]
    composite = Composite(layers, memory="reversible", keep_every=2)
    gradients(composite, data(dtype=torch.float32) / 10)
    assert composite.inversion_error == pytest.approx(0.25, abs=1e-6)


# --- where chains are used ---------------------------------------------------------------------


@each_mode
def test_nothing_is_kept_without_gradients(memory):
    composite = chain(memory)
    with torch.no_grad():
        expected = chain()(data())
        assert kept_bytes(composite) == 0
    assert all(map(torch.equal, composite(data()), expected))


@each_mode
def test_empty_chains_and_batches(memory):
    empty, inputs = Composite([], memory=memory), data().requires_grad_()
    outputs, logabsdet = empty(inputs)
    (outputs * 2).sum().backward()
    assert torch.equal(inputs.grad, torch.full_like(inputs, 2)) and not logabsdet.any()
    composite = chain(memory)
    outputs, logabsdet = composite(data(rows=0))
    (outputs.sum() + logabsdet.sum()).backward()
    assert all(not parameter.grad.any() for parameter in composite.parameters())


@each_mode
def test_layers_that_hand_on_what_they_get(memory):
    inputs = data().requires_grad_()
    outputs, logabsdet = Composite([IdentityTransform(), IdentityTransform()], memory=memory)(
        inputs
    )
    logabsdet += 1  # as nflows does
    (2 * outputs).sum().backward()
    assert torch.equal(inputs.grad, torch.full_like(inputs, 2))


@each_mode
def test_chain_within_a_chain(memory):
    nested = Composite([Composite(chain().transforms, memory=memory)], memory=memory)
    found = gradients(nested, data())
    torch.testing.assert_close(found, gradients(chain(), data()), atol=1e-9, rtol=1e-7)


@each_mode
def test_torch_func_sees_through(memory):
    def jacobian(composite: Composite) -> Tensor:
        return jacrev(lambda row: composite(row.unsqueeze(0))[0][0])(data()[0])

    torch.testing.assert_close(jacobian(chain(memory)), jacobian(chain()))


def test_derivatives_of_derivatives():
    def second(composite: Composite) -> Tensor:
        inputs = data().requires_grad_()
        (first,) = torch.autograd.grad(loss(composite, inputs), inputs, create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs)[0]

    torch.testing.assert_close(second(chain("checkpoint")), second(chain()))
    with pytest.raises(RuntimeError, match="memory='reversible'.*create_graph"):
        second(chain("reversible"))


@each_mode
def test_export_of_a_density(memory):
    composite = chain(memory, dtype=torch.float32)
    inputs = data(dtype=torch.float32)
    program = torch.export.export(composite, (inputs,))
    torch.testing.assert_close(program.module()(inputs), composite(inputs))


def test_copies_and_representation():
    composite = chain("reversible", 2)
    gradients(composite, data())
    copied = copy.deepcopy(composite)
    torch.testing.assert_close(gradients(copied, data()), gradients(composite, data()))
    assert "memory='reversible', keep_every=2" in repr(copied)
    assert "memory" not in repr(chain())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "swap"}, "memory must be .*, got 'swap'"),
        ({"keep_every": 2}, "keep_every must be None for memory='store'.*got 2"),
        ({"memory": "reversible", "keep_every": 0}, "keep_every must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Composite([], **options)


class Density(nn.Module):
    def __init__(self, composite: Composite) -> None:
        super().__init__()
        self.composite = composite

    def forward(self, inputs: Tensor) -> Tensor:
        return loss(self.composite, inputs)


def _distributed(rank: int, address: str, queue) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{address}", rank=rank, world_size=2
    )
    for memory in MODES:
        model = DistributedDataParallel(Density(chain(memory)))
        for _ in range(2):  # the second step finds out whether the first one was finished
            model.zero_grad()
            model(data()[10 * rank : 10 * rank + 10]).backward()
        if rank == 0:
            queue.put([parameter.grad.numpy() for parameter in model.parameters()])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_processes_agree_on_the_gradients_of_all_rows(tmp_path):
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = str(tmp_path / "meeting"), queue
    running = multiprocessing.spawn(_distributed, arguments, nprocs=2, join=False)
    for _ in MODES:
        found = [torch.from_numpy(gradient) for gradient in queue.get()]
        torch.testing.assert_close(found, gradients(chain(), data()), atol=1e-9, rtol=1e-7)
    running.join()
