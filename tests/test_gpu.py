"""A replay of a CUDA graph does what the function would have done.

Without --all the graphs themselves, which are plumbing, are tested with ppo and ddpg only."""
import pytest
import torch
import torch.nn.functional as F
from conftest import ENVS, flags, same, small, takes, timeless

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def arguments(module, script, **changes):
    env = ENVS[takes(module, "Discrete", "Box")[0]]
    return module.Args(**small(script, env=env, device="cuda") | changes)


def learner(module, device):
    """A regression by Adam on one vector of weights: (weights, optimizer, update)."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    net.to(device)
    weights = module.flatten_parameters(net)
    rate = torch.tensor(1e-2, device=device)
    optimizer = torch.optim.Adam([weights], rate, fused=True, capturable=True)

    def update(x, y):
        loss = F.mse_loss(net(x).squeeze(-1), y)
        weights.grad.zero_()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return weights, optimizer, update


def batches(device, sizes):
    generator = torch.Generator(device).manual_seed(1)
    return [(torch.randn(n, 4, device=device, generator=generator),
             torch.randn(n, device=device, generator=generator)) for n in sizes]


@pytest.mark.plumbing
@pytest.mark.parametrize("sizes", [[16] * 20, [16, 16, 7] * 8])  # a remainder has its own graph
def test_captured_updates_equal_eager_ones_on_new_inputs_and_step_sizes(script, module, sizes):
    device = module.setup(arguments(module, script))
    results = []
    for wrap in (module.cuda_graph, lambda function, device: function):
        weights, optimizer, update = learner(module, device)
        update, losses = wrap(update, device), []
        for k, batch in enumerate(batches(device, sizes)):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (k + 1))
            losses.append(update(*batch))
        results.append((torch.stack(losses), weights.clone()))
    (losses, weights), (eager_losses, eager_weights) = results
    assert torch.allclose(losses, eager_losses, atol=1e-5)
    assert torch.allclose(weights, eager_weights, atol=1e-5)
    assert len(losses.unique()) == len(losses)  # a replay sees its own batch and keeps its answer


@pytest.mark.plumbing
def test_a_step_size_of_0_stops_a_captured_update(script, module):
    device = module.setup(arguments(module, script))
    weights, optimizer, update = learner(module, device)
    update, (batch,) = module.cuda_graph(update, device), batches(device, [16])
    for _ in range(6):
        update(*batch)
    before = weights.clone()
    optimizer.param_groups[0]["lr"].fill_(0)
    update(*batch)
    assert torch.equal(weights, before)
    optimizer.param_groups[0]["lr"].fill_(1e-2)
    update(*batch)
    assert not torch.equal(weights, before)


@pytest.mark.plumbing
def test_a_captured_draw_is_another_one_at_every_replay(script, module):
    device = module.setup(arguments(module, script))
    draw = module.cuda_graph(lambda x: x + torch.randn_like(x), device)
    draws = [draw(torch.zeros(8, device=device)) for _ in range(10)]
    assert len(torch.stack(draws).unique(dim=0)) == 10


def test_training_with_graphs_follows_the_curve_of_training_without(script, module, monkeypatch):
    args = arguments(module, script, total_timesteps=2048)
    agent, history = module.train(args)
    monkeypatch.setattr(module, "cuda_graph", lambda function, device: function)
    eager, eager_history = module.train(args)
    for row, expected in zip(timeless(history), timeless(eager_history), strict=True):
        assert row == pytest.approx(expected, rel=1e-2, abs=1e-3, nan_ok=True)
    for name, value in agent.state_dict().items():
        assert torch.allclose(value.float(), eager.state_dict()[name].float(), atol=1e-3), name


@pytest.mark.exhaustive
def test_the_same_seed_gives_the_same_run_on_the_gpu(script, module):
    args = arguments(module, script)
    (a, first), (b, second) = module.train(args), module.train(args)
    assert same(timeless(first), timeless(second)) and same(a.state_dict(), b.state_dict())


@pytest.mark.plumbing
def test_a_run_on_the_gpu_can_be_resumed_and_scored_on_the_cpu(script, module, command):
    settings = vars(arguments(module, script, total_timesteps=256))
    code, _, err = command(*flags(settings | dict(run_dir="run")), "--episodes", 1)
    assert (code, err) == (0, "")
    code, _, err = command("--resume", "run", "--total-timesteps", 512, "--device", "cpu",
                           "--episodes", 1)
    assert (code, err) == (0, "")
